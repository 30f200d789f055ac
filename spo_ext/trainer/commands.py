"""`spo train` and `spo score`: their arguments, and what they print."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spo_ext.commands import fail, failures, import_from_here, require_store
from spo_ext.shown import say

if TYPE_CHECKING:
    from spo_ext.commands import Subparsers
    from spo_ext.trainer import SPOTrainer

_DTYPES = ("float32", "bfloat16", "float16", "auto")
_PRECISIONS = ("no", "bf16", "fp16")


def _field(default: Any, words: str) -> Any:
    return field(default=default, metadata={"help": words})


@dataclass
class ModelArguments:
    """What `spo train` loads; folders that save_pretrained wrote."""

    model: str = field(metadata={"help": "folder of the policy to start from"})
    tokenizer: str | None = _field(None, "folder of the tokenizer (default: that of model)")
    ref_model: str | None = _field(None, "folder of the reference, if it is another model")
    dtype: str = _field("float32", "of the weights; with --bf16 the arithmetic is bfloat16 anyway")
    attn_implementation: str | None = _field(
        None,
        "of transformers; default: flash_attention_2 on a GPU where it is installed, else sdpa",
    )
    lora_r: int | None = _field(None, "train adapters of this rank; the base is the reference")
    lora_alpha: int | None = _field(None, "their scale times lora_r (default: 2 lora_r)")
    lora_dropout: float = _field(0.0, "dropout of their inputs")
    lora_target_modules: list[str] | None = _field(
        None, "names of linear layers (default: all but the head)"
    )
    resume: bool = _field(False, "continue the last complete checkpoint of output_dir")

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {self.dtype!r}")
        if self.lora_r is not None and self.ref_model is not None:
            raise ValueError("ref_model must be left out with lora_r: the base is the reference")


def add_train(subparsers: Subparsers) -> None:
    """Only for the list of commands: `train` reads its own arguments."""
    subparsers.add_parser(
        "train",
        help="learn from the trajectories of a store, online ones rolled out on the way",
        add_help=False,
    )


def train(arguments: Sequence[str]) -> int:
    """Runs `spo train`; the exit status."""
    try:
        from spo_ext.trainer.yaml_config import parse, set_environment

        set_environment(arguments)
        from spo_ext.trainer import SPOConfig
    except ImportError as error:
        return fail(f"{error}. Install its packages: pip install 'spo_ext[trainer]'")
    words = "Soft Policy Optimization on a trajectory store, with transformers.Trainer."
    config, model = parse([SPOConfig, ModelArguments], arguments, description=words)
    try:
        require_store(config.store)
        import_from_here()
        trainer = make_trainer(config, model)
        trainer.train(resume_from_checkpoint=config.resume_from_checkpoint or model.resume)
        trainer.save_model()
        trainer.save_state()
        trainer.accelerator.end_training()  # ends the group; PyTorch warns of one that is left
    except _foreseen() as error:
        if type(error) is RuntimeError:
            raise  # of PyTorch: where it happened says more than its words
        return fail(error)
    except KeyboardInterrupt:
        return fail("interrupted; --resume continues the last checkpoint", status=130)
    return 0


def make_trainer(config: Any, settings: ModelArguments) -> SPOTrainer:
    """The trainer with model, adapters, reference and tokenizer loaded."""
    from transformers import set_seed

    from spo_ext.data.tokens import load_tokenizer
    from spo_ext.trainer import SPOTrainer

    tokenizer = load_tokenizer(settings.tokenizer or settings.model)
    policy = _load(settings.model, settings)
    # Before the adapters are drawn: they must be the same on every rank, and in every run.
    set_seed(config.seed)
    if settings.lora_r is not None:
        policy = _with_adapters(policy, settings)
    reference = None if settings.ref_model is None else _load(settings.ref_model, settings)
    return SPOTrainer(policy, config, tokenizer, ref_model=reference)


def _load(folder: str, settings: ModelArguments) -> Any:
    import torch
    from transformers.utils.import_utils import is_flash_attn_2_available

    from spo_ext.models import load_model

    if (Path(folder) / "adapter_config.json").is_file():
        raise ValueError(
            f"train: model must be a folder with whole weights, got an adapter in {folder!r}: "
            "merge it into its base first (PeftModel.merge_and_unload), or hand a PeftModel to "
            "SPOTrainer"
        )
    attention = settings.attn_implementation
    if attention is None and torch.cuda.is_available() and is_flash_attn_2_available():
        attention = "flash_attention_2"
    # The Trainer moves it to the device of its rank.
    return load_model(folder, "cpu", settings.dtype, attn_implementation=attention)


def _with_adapters(model: Any, settings: ModelArguments) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError(f"lora_r needs peft ({error}): pip install peft") from error
    assert settings.lora_r is not None
    adapters = LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha or 2 * settings.lora_r,
        lora_dropout=settings.lora_dropout,
        target_modules=settings.lora_target_modules or "all-linear",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, adapters)


def _foreseen() -> tuple[type[BaseException], ...]:
    return (*failures(), TypeError)  # of a model without a plain head


def add_score(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "score",
        help="log-probabilities of a reference model for all trajectories of a store",
        description="Scores what is not scored yet and keeps it in the store, so that spo train "
        "--reference cached needs no reference model. Prints the reference's fingerprint.",
    )
    parser.add_argument("--store", required=True, metavar="FILE_OR_URL")
    parser.add_argument("--model", required=True, metavar="FOLDER", help="the reference")
    parser.add_argument(
        "--tokenizer", metavar="FOLDER", help="that spo train will have (default: the model's)"
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="(default: 1)")
    parser.add_argument(
        "--batch-tokens", type=int, default=16384, metavar="N", help="tokens scored at once"
    )
    parser.add_argument("--dtype", choices=_DTYPES, default="float32", help="(default: float32)")
    parser.add_argument(
        "--mixed-precision",
        choices=_PRECISIONS,
        default="no",
        help="that spo train will have: bf16 for its --bf16 (default: no)",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=_score)


def _score(options: argparse.Namespace) -> int:
    try:
        from spo_ext.data.tokens import load_tokenizer
        from spo_ext.models import load_model
        from spo_ext.store import TrajectoryStore
        from spo_ext.trainer.feed import score_store
    except ImportError as error:
        return fail(f"{error}. Install its packages: pip install 'spo_ext[trainer]'")
    try:
        require_store(options.store)
        tokenizer = load_tokenizer(options.tokenizer or options.model)
        model = load_model(options.model, dtype=options.dtype, quiet=options.quiet)
        with TrajectoryStore(options.store) as store:
            store.require_writable("score")
            fingerprint, count = score_store(
                store,
                model,
                tokenizer,
                temperature=options.temperature,
                precision=options.mixed_precision,
                batch_tokens=options.batch_tokens,
                quiet=options.quiet,
            )
    except _foreseen() as error:
        return fail(error)
    except KeyboardInterrupt:
        return fail("interrupted; what was scored stays", status=130)
    say(f"{count} trajectories scored by reference {fingerprint}")
    return 0
