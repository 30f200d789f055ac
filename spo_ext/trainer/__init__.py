"""A thin trainer on transformers.Trainer that learns from any trajectory of a store.

trainer = SPOTrainer(model, SPOConfig(output_dir="runs/first", store="trajectories.db",
                                      max_steps=100, group_size=4), tokenizer)
trainer.train()
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spo_ext.trainer.config import SPOConfig as SPOConfig
    from spo_ext.trainer.trainer import SPOTrainer as SPOTrainer

__all__ = ["SPOConfig", "SPOTrainer"]


def __getattr__(name: str) -> Any:
    # On first use, because the command line reads this package and may not need transformers.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from spo_ext.trainer.config import SPOConfig
        from spo_ext.trainer.trainer import SPOTrainer
    except ImportError as error:
        raise ImportError(
            f"spo_ext.trainer needs transformers and accelerate ({error}): "
            "pip install 'spo_ext[trainer]'"
        ) from error
    return {"SPOConfig": SPOConfig, "SPOTrainer": SPOTrainer}[name]
