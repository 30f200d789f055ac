"""Lets Accelerate shard a model over processes on the CPU, as it does over GPUs.

AcceleratorState of accelerate 1.15 takes its FSDP plugin only where processes have accelerators; on
CPUs it drops it without a word and the run is DDP. PyTorch's FSDP2 itself works over gloo.
"""

from typing import Any


def allow_fsdp_on_cpu() -> None:
    """To be called before TrainingArguments or an Accelerator is made."""
    from accelerate import state
    from accelerate.utils import DistributedType

    original = state.AcceleratorState.__init__

    def patched(self: Any, *arguments: Any, fsdp_plugin: Any = None, **options: Any) -> None:
        original(self, *arguments, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    state.AcceleratorState.__init__ = patched
