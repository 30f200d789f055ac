"""Run in each of several processes: shards a model by FSDP2, trains a step, publishes, compares."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from fsdp_on_cpu import allow_fsdp_on_cpu
from publish_cases import lora_model, tiny_model


def outcome(kind: str, directory: Path) -> dict[str, Any]:
    from accelerate import Accelerator
    from accelerate.utils import FullyShardedDataParallelPlugin
    from transformers import AutoModelForCausalLM

    from spo_ext.trainer.publish import DirectoryPublisher

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Qwen2DecoderLayer"],
        state_dict_type="FULL_STATE_DICT",
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    model = tiny_model() if kind == "whole" else lora_model("linear")
    optimizer = torch.optim.SGD([w for w in model.parameters() if w.requires_grad], lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    sharded = all(type(weight).__name__ == "DTensor" for weight in model.parameters())
    ids = torch.arange(12).view(2, 6)
    accelerator.backward(model(input_ids=ids, labels=ids).loss)
    optimizer.step()
    state = accelerator.get_state_dict(model)  # by all ranks; whole tensors on the first
    if accelerator.is_main_process:
        DirectoryPublisher(directory).publish(accelerator.unwrap_model(model), None, 1, state)
    accelerator.wait_for_everyone()
    loaded = AutoModelForCausalLM.from_pretrained(directory / "version-0000001")
    with torch.no_grad():
        difference = (loaded(ids).logits - model(ids).logits).abs().max().item()
        before = (tiny_model()(ids).logits - model(ids).logits).abs().max().item()
    return {"difference": difference, "before": before, "sharded": sharded}


if __name__ == "__main__":
    allow_fsdp_on_cpu()
    outcomes = [outcome(kind, Path(sys.argv[1], kind)) for kind in ("whole", "lora")]
    Path(os.environ["OUT"]).write_text(json.dumps(outcomes))
    torch.distributed.barrier()  # so that neither rank leaves while the other still talks to it
    sys.stdout.flush()
    sys.stderr.flush()
    # Without the interpreter's shutdown: a thread of gloo may still hold the last tensors then, and
    # aborts the process (PyTorch's pull request 179291 describes it; the group's end does not help
    # while FSDP2's device mesh refers to it).
    os._exit(0)
