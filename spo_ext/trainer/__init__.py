"""A thin trainer on transformers.Trainer that learns from any trajectory of a store.

trainer = SPOTrainer(model, SPOConfig(output_dir="runs/first", store="trajectories.db",
                                      max_steps=100, group_size=4), tokenizer)
trainer.train()
"""

try:
    import accelerate as _accelerate  # noqa: F401
    import transformers as _transformers  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"spo_ext.trainer needs transformers and accelerate ({error}): "
        "pip install 'spo_ext[trainer]'"
    ) from error

from spo_ext.trainer.config import SPOConfig
from spo_ext.trainer.trainer import SPOTrainer

__all__ = ["SPOConfig", "SPOTrainer"]
