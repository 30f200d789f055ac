"""The policy as the trainer calls it: from token ids to log-probabilities of completions.

`spo_ext.integrations.huggingface` puts them into the model's own forward pass; here is what is
tried out before a run relies on them.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from spo_ext.checks import check_one_of
from spo_ext.integrations.agreement import Way, check_agreement, reset_rope, rope_limit
from spo_ext.integrations.huggingface import add_token_logprobs
from spo_ext.models import disable_dropout
from spo_ext.trainer.batches import Layout, TokenBatch, collate, company

Precision = Literal["no", "bf16", "fp16"]
PRECISIONS: tuple[Precision, ...] = ("no", "bf16", "fp16")
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def precision_of(accelerator: Accelerator) -> Precision:
    """The mixed precision that Accelerate puts around the policy.

    Raises ValueError for one that a reference cannot be given (fp8).
    """
    found = accelerator.mixed_precision if accelerator.native_amp else "no"
    check_one_of("SPO", "mixed_precision", found, PRECISIONS)
    return cast(Precision, found)


def autocast(model: nn.Module, precision: Precision) -> AbstractContextManager[object]:
    """What Accelerate puts around the policy's forward, for a model that it does not prepare."""
    if precision == "no":
        return nullcontext()
    return torch.autocast(next(model.parameters()).device.type, _DTYPES[precision])


def keep_logprobs(accelerator: Accelerator) -> None:
    """Before the model is sharded: FSDP2 shall not round its answers to the precision of its
    weights, as Accelerate asks it to. A sum of log-probabilities has no digits to spare."""
    plugin: Any = getattr(accelerator.state, "fsdp_plugin", None)
    policy: Any = getattr(plugin, "mixed_precision_policy", None)
    if getattr(policy, "output_dtype", None) is not None:
        plugin.mixed_precision_policy = dataclasses.replace(policy, output_dtype=None)


def round_like_sharded(model: nn.Module, accelerator: Accelerator) -> None:
    """Rounds a reference's weights as FSDP2 rounds the policy's when it gathers them."""
    plugin: Any = getattr(accelerator.state, "fsdp_plugin", None)
    dtype = getattr(getattr(plugin, "mixed_precision_policy", None), "param_dtype", None)
    if dtype is not None:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)


def named_with(fingerprint: str, precision: Precision) -> str:
    """The name under which the store keeps what a reference says in this precision."""
    return fingerprint if precision == "no" else f"{precision}-{fingerprint}"


def is_named_with(fingerprint: str, precision: Precision) -> bool:
    given = fingerprint.partition("-")[0] if "-" in fingerprint else "no"
    return given == precision


_FLASH = ("flash_attention_2", "flash_attention_3")


@dataclass(frozen=True, slots=True)
class HeadSettings:
    """What every log-probability of a run has in common; see `spo_ext.token_logprobs`."""

    temperature: float = 1.0
    max_dropped_mass: float = 0.0
    workspace_mib: int | None = None
    disable_dropout: bool = True


def answer_logprobs(model: Any, settings: HeadSettings) -> None:
    """Lets the model answer `completion_logprobs`, without dropout unless the settings keep it.

    Raises what `add_token_logprobs` does, which compares the answer with the model's logits.
    """
    if settings.disable_dropout:
        disable_dropout(model)
    add_token_logprobs(
        model,
        temperature=settings.temperature,
        max_dropped_mass=settings.max_dropped_mass,
        workspace_mib=settings.workspace_mib,
    )


class Scores(NamedTuple):
    """Of the completions' tokens, float32 [N] in nats; entropies and router_loss, a number, None
    if they were not asked for."""

    logprobs: Tensor
    entropies: Tensor | None
    router_loss: Tensor | None


def completion_logprobs(
    model: nn.Module, batch: TokenBatch, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities, and entropies if asked for; see `completion_scores`."""
    scores = completion_scores(model, batch, entropy=entropy)
    return scores.logprobs, scores.entropies


def completion_scores(
    model: nn.Module, batch: TokenBatch, *, entropy: bool = False, router: bool = False
) -> Scores:
    """What the model says of the completions, without a gradient in the entropies.

    In one call of the model, so that DDP, FSDP2, autocast and PEFT do what they do around it; in
    several where sequences would change each other's in one. router: also the load-balancing loss
    of a mixture of experts, the mean over the calls.
    """
    limit = rope_limit(_config(model))
    parts = _parts(batch, limit)
    calls = parts + parts[:1] * (batch.calls - len(parts))
    device = next(model.parameters()).device
    more = {"output_router_logits": True} if router else {}
    answers: list[Any] = []
    for part, _ in calls:
        if limit is not None:
            reset_rope(model)
        answers.append(model(**part.on(device), **more, logprob_entropy=entropy))
    columns = list(zip(*answers, strict=True)) if entropy or router else [answers]
    loss = _mean(columns.pop(), len(parts)) if router else None
    merged = [
        column[0] if len(calls) == 1 else _merged(column, parts, batch.cu_seqlens)
        for column in columns
    ]
    return Scores(merged[0], merged[1].detach() if entropy else None, loss)


def _mean(answers: Sequence[Tensor], count: int) -> Tensor:
    """Of the first so many; those beyond belong to the graph."""
    losses = torch.stack(list(answers))
    return losses[:count].mean() + 0 * losses[count:].sum()


def _parts(batch: TokenBatch, limit: int | None) -> list[tuple[TokenBatch, list[int]]]:
    """What may be in one call of the model, and which sequences of the batch those are."""
    groups: dict[int, list[int]] = {}
    for place, tokens in enumerate(batch.sequences):
        groups.setdefault(company(tokens, batch.layout, limit), []).append(place)
    if len(groups) <= 1 and (batch.layout == "equal" or not any(groups)):
        return [(batch, list(range(len(batch.sequences))))]
    return [
        (collate([batch.sequences[i] for i in group], "equal" if key else batch.layout), group)
        for key, group in groups.items()
    ]


def _merged(
    answers: Sequence[Tensor], parts: list[tuple[TokenBatch, list[int]]], cu_seqlens: Tensor
) -> Tensor:
    """Per-token answers [N] in the order of the batch; calls beyond the parts add nothing, but
    belong to the graph, as on the other ranks."""
    places = torch.cat(
        [
            torch.arange(int(cu_seqlens[i]), int(cu_seqlens[i + 1]))
            for _, group in parts
            for i in group
        ]
    )
    joined = torch.cat(list(answers[: len(parts)]))
    found = joined[places.argsort().to(joined.device)]
    return found + sum(0 * extra.sum() for extra in answers[len(parts) :])


def _config(model: Any) -> Any:
    """Also of one that DDP or torch.compile wrapped."""
    while not hasattr(model, "config"):
        model = getattr(model, "module", None) or getattr(model, "_orig_mod", None)
        if model is None:
            return None
    return base_model(model).config


def base_model(model: nn.Module) -> Any:
    """The causal language model of transformers inside PEFT's, or the model itself."""
    get_base = getattr(model, "get_base_model", None)
    return model if get_base is None else get_base()


def adapters_off(model: nn.Module) -> AbstractContextManager[object]:
    """A context in which PEFT's adapters add nothing; without adapters it does nothing."""
    disable = getattr(model, "disable_adapter", None)
    return nullcontext() if disable is None else disable()


def has_adapters(model: nn.Module) -> bool:
    return hasattr(model, "disable_adapter") and hasattr(model, "peft_config")


def choose_layout(
    packing: str,
    model: nn.Module,
    *,
    training: bool = False,
    sharing: bool = True,
    owner: str = "SPO",
) -> Layout:
    """How sequences lie in a batch; flash attention takes one row, the others a mask of each row.

    packing: padded, packed, shared, or auto for the last of these that the model allows.
    training: see `check_agreement`, which looks at what the model does.
    sharing: auto may mean shared.

    Raises ValueError if packing is asked for and the model mixes up what is packed, or if there is
    no layout in which every sequence gets the log-probabilities that it gets alone.
    """
    attention = getattr(base_model(model).config, "_attn_implementation", "")
    packed: Way = "row" if attention in _FLASH else "rows"
    shared: tuple[Way, ...] = () if attention in _FLASH else ("shared",)
    ways: dict[str, tuple[Way, ...]] = {
        "shared": shared,
        "packed": (packed,),
        "padded": ("padded", "equal"),
        "auto": (*(shared if sharing else ()), packed, "padded", "equal"),
    }
    try:
        found = check_agreement(model, ways[packing], training=training, owner=owner)
        return cast(Layout, found)
    except ValueError as error:
        if packing not in ("packed", "shared"):
            raise
        raise ValueError(
            f"{owner}: packing must be auto or padded for this model, got {packing!r}: {error}"
        ) from error


_PREFIX = "base_model.model."  # what PEFT puts before the names of the model
_UNMERGED = "publish the adapter by itself with merge_adapter=False"


def is_peft(model: nn.Module) -> bool:
    """Whether it is a peft.PeftModel."""
    peft = sys.modules.get("peft")  # without the import there can be no such model
    return peft is not None and isinstance(model, peft.PeftModel)


def policy_state(
    model: nn.Module, state_dict: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Weights by the names of the model without adapters.

    A merged weight is W + scaling * (B A), added in float32, rounded once to the dtype of W and
    kept in host memory. The model is only read. All other tensors are those of the model.

    Args:
        model: a PreTrainedModel, or a PeftModel with LoRA of linear and embedding layers.
        state_dict: of `model`, with whole tensors, where `model.state_dict()` has only shards.

    Raises ValueError for adapters that are no such sum (DoRA, other methods than LoRA, a weight
    tied to one that has no adapter).
    """
    state = dict(model.state_dict() if state_dict is None else state_dict)
    if not is_peft(model):
        return state
    tuned = _lora_layers(model)
    merged: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name = _plain_name(key, model)
        if name is None:
            continue
        layer_name, _, leaf = key.rpartition(".base_layer.")
        if leaf == "weight" and layer_name in tuned:
            tensor = _merge(tensor, layer_name, tuned[layer_name], state)
        merged[name] = tensor
    _check_tied(model, merged)
    return merged


def _lora_layers(model: nn.Module) -> dict[str, Any]:
    """LoRA layers by name; raises ValueError for what is not W + scaling * (B A)."""
    from peft.tuners.lora.layer import Embedding, Linear
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    tuned: dict[str, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            plain = isinstance(module, (Linear, Embedding)) and not (
                module.merged or module.lora_variant or any(module.lora_bias.values())
            )
            if not plain:
                _refuse(f"{name} ({type(module).__name__}) is not plain, unmerged LoRA")
            tuned[name] = module
        elif isinstance(module, AuxiliaryTrainingWrapper):
            if not isinstance(module, ModulesToSaveWrapper):
                _refuse(f"{name} ({type(module).__name__}) is not LoRA")
    return tuned


def _plain_name(key: str, model: Any) -> str | None:
    """The name without adapters; None for what exists only because of them."""
    if ".lora_" in key or ".original_module." in key:
        return None
    saved = re.search(r"\.modules_to_save\.([^.]+)\.", key)
    if saved is not None:
        if saved[1] not in model.active_adapters:
            return None
        key = key.replace(saved[0], ".")
    return key.replace(".base_layer.", ".").removeprefix(_PREFIX)


def _merge(weight: Tensor, name: str, layer: Any, state: Mapping[str, Tensor]) -> Tensor:
    embedding = bool(layer.lora_embedding_A)
    total = weight.detach().to(torch.float32)
    for adapter in layer.active_adapters:
        if adapter not in layer.scaling:
            continue
        if embedding:
            keys = [f"{name}.lora_embedding_{factor}.{adapter}" for factor in "AB"]
        else:
            keys = [f"{name}.lora_{factor}.{adapter}.weight" for factor in "AB"]
        if any(key not in state for key in keys):
            raise ValueError(f"policy_state: state_dict must have {keys[0]} and {keys[1]}")
        a, b = (state[key].detach().to(torch.float32) for key in keys)
        delta = b @ a
        transposed = embedding or layer.fan_in_fan_out
        total = total + layer.scaling[adapter] * (delta.T if transposed else delta)
    return total.to(weight.dtype).cpu()


def _check_tied(model: Any, merged: Mapping[str, Tensor]) -> None:
    base = model.get_base_model()
    if not getattr(base.config.get_text_config(), "tie_word_embeddings", False):
        return
    for name, source in base.all_tied_weights_keys.items():
        if {name, source} <= merged.keys() and not torch.equal(
            merged[name].cpu(), merged[source].cpu()
        ):
            _refuse(f"{source} and {name} are tied, and only one has the adapter")


def _refuse(reason: str) -> None:
    raise ValueError(f"policy_state: the adapter cannot be merged: {reason}; {_UNMERGED}")
