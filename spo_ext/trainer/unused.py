"""Settings of transformers.TrainingArguments that mean nothing to SPO, or something wrong."""

from __future__ import annotations

from transformers import TrainingArguments

from spo_ext.store.checks import refuse

# The only value that is taken, and why.
_ONLY: dict[str, tuple[object, str]] = {
    "auto_find_batch_size": (False, "a smaller batch would cut groups apart"),
    "label_smoothing_factor": (0.0, "a completion has a reward, no labels"),
    "neftune_noise_alpha": (None, "the reference has no such noise, so it would count as learned"),
    "train_sampling_strategy": ("random", "the store draws: see mixture, strata and max_age"),
    "use_liger_kernel": (False, "the loss is computed without logits already"),
    "bf16_full_eval": (False, "evaluation samples in the precision of training: see bf16"),
    "fp16_full_eval": (False, "evaluation samples in the precision of training: see fp16"),
}


def refuse_unused(arguments: TrainingArguments) -> None:
    """Raises ValueError for a setting that would be ignored, or break the loss."""
    for name, (only, why) in _ONLY.items():
        value = getattr(arguments, name)
        if value != only:
            refuse("SPOConfig", name, f"{only!r} ({why})", value)
