"""Whether a model's log-probabilities are those of its own logits, one sequence at a time.

`check_agreement` is asked once, before the first use, and says how the model can be served.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from spo_ext.integrations.heads import inside, longest, ordinary_tokens
from spo_ext.models import evaluating
from spo_ext.trainer.batches import TokenBatch, Tokens, collate, collate_shared

Way = Literal["shared", "row", "rows", "padded", "left", "equal"]

# Prompt and completion: lengths that leave room in rows, fill them, and differ.
_SIZES = ((6, 18), (3, 14), (2, 7), (4, 2), (1, 1))
_LONGEST_REACH = 128
_FLOOR = 1e-5  # nats
_REACHES = ("window", "compress", "chunk", "block_size")
_WORDS = {
    "shared": "behind a prompt that it shares with another",
    "row": "with sequences packed in one row",
    "rows": "with sequences packed in rows",
    "padded": "beside longer ones, padded on the right",
    "left": "beside longer ones, padded on the left",
    "equal": "beside one of its length",
}


def check_agreement(
    model: Any, ways: Sequence[Way], *, training: bool = False, owner: str = "SPO"
) -> Way:
    """The first of the ways in which every sequence gets what it would get alone.

    Ways to call the model, of which the caller names those that it can use, the best first:
        "shared", "row", "rows", "padded": as `spo_ext.trainer.batches.collate` lays sequences out.
        "left": padding on the left, input_ids and attention_mask alone, as TRL calls a model. Where
            it is not right "padded" may be: move the padding to the right.
        "equal": only sequences of one length in a batch, input_ids alone.

    The model answers logprob_targets already (see `add_token_logprobs`, which has compared its
    head with its logits). Call it with the weights, dtype and autocast that will be used, before
    DDP or FSDP. No gradient, mode, cache or random state is changed.

    How far apart two answers may be follows from the model: three times what one rounding of its
    embeddings changes, as root mean square over the tokens of a sequence. What only other tokens in
    a batch of the same shape change may be an eighth of it, since nothing else is rounded there.

    Args:
        training: also compare the model in training mode with itself in eval mode, as for a policy
            without dropout.

    Raises:
        ValueError: if none of the ways is right, or the model looks ahead; says what was seen.
    """
    name = type(inside(model)).__name__
    sequences, reach = _probes(model), window(model)
    with undisturbed(model):
        try:
            alone = _alone(model, sequences)
            with rounded(model):
                noise = _usual(_distances(_alone(model, sequences), alone))
            ahead = distance(_alone(model, sequences[:1], changed_end=True), alone[:1])
            shorter = [
                Tokens(one.prompt, one.completion[: -(-len(one.completion) // 2)])
                for one in sequences
            ]
            cut = distance(_alone(model, shorter), alone)
        except Exception as error:  # whatever the code of a model may raise
            raise ValueError(
                f"{owner}: {name} must answer a sequence alone, got {type(error).__name__}: {error}"
            ) from error
        allowed, exact = 3 * noise + _FLOOR, noise / 8 + _FLOOR
        if not ahead <= exact:
            raise ValueError(
                f"{owner}: a log-probability must not depend on later tokens, got a difference of "
                f"{ahead:.3g} in {name} ({exact:.2g} would be rounding)"
            )
        if inside(model) is not model:
            _check_wrapped(model, sequences[0], alone[0], allowed, owner)
        if training:
            _check_training(model, sequences, alone, allowed, owner)
        seen = []
        for way in ways:
            if way != "equal" and not cut <= allowed:
                seen.append(f"{_WORDS[way]}: a difference of {cut:.3g} by the length alone")
                continue
            if way == "shared" and _reach(inside(model).config.to_dict(), most=None) > reach:
                seen.append(f"{_WORDS[way]}: its mask would take the place of a far window's")
                continue
            try:
                together = _together(model, sequences, way)
                far = distance(together, alone)
                leak = _leak(model, sequences, way, together)
            except Exception as failure:
                seen.append(f"{_WORDS[way]}: {type(failure).__name__}: {failure}")
                continue
            if far <= allowed and leak <= exact:
                return way
            seen.append(f"{_WORDS[way]}: a difference of {max(far, leak):.3g}")
    raise ValueError(
        f"{owner}: {name} must give a sequence the log-probabilities that it gets alone "
        f"({allowed:.2g} would be rounding), got {'; '.join(seen)}"
    )


def _check_wrapped(model: Any, one: Tokens, alone: Tensor, allowed: float, owner: str) -> None:
    """`add_token_logprobs` has compared the model inside with its logits; this, the one around it,
    which may put tokens of its own before the sequence."""
    temperature = getattr(inside(model).forward, "temperature", None)
    if temperature is None:  # covered by a later wrapper
        return
    ids = torch.tensor([one.all], device=device(model))
    logits: Tensor = model(input_ids=ids, use_cache=False).logits[0, -len(one.completion) - 1 : -1]
    targets = ids[0, -len(one.completion) :, None]
    own = (logits.float() / temperature).log_softmax(-1).gather(-1, targets)[:, 0]
    allowed += torch.finfo(logits.dtype).eps * float(logits.abs().max()) / temperature
    error = distance([alone], [own])
    if not error <= allowed:
        raise ValueError(
            f"{owner}: log-probabilities of {type(model).__name__} must be those of its logits, "
            f"got a difference of {error:.3g} ({allowed:.2g} would be rounding)"
        )


def _check_training(
    model: Any, sequences: list[Tokens], alone: list[Tensor], allowed: float, owner: str
) -> None:
    try:
        model.train()  # `undisturbed` puts every module back
        error = distance(_alone(model, sequences), alone)
    except Exception as failure:  # whatever the code of a model may raise
        raise ValueError(
            f"{owner}: {type(inside(model)).__name__} must answer a sequence in training mode, got "
            f"{type(failure).__name__}: {failure}"
        ) from failure
    finally:
        model.eval()
    if not error <= allowed:
        raise ValueError(
            f"{owner}: {type(inside(model)).__name__} must give the same log-probabilities in "
            f"training mode as in eval mode, in which the reference is, got a difference of "
            f"{error:.3g} ({allowed:.2g} would be rounding): it adds noise that is not dropout"
        )


def _alone(model: Any, sequences: list[Tokens], changed_end: bool = False) -> list[Tensor]:
    """Log-probabilities of each sequence without company; with changed_end those of its first half,
    when other tokens follow."""
    found = []
    for one in sequences:
        batch = collate([one], "equal")
        inputs = batch.on(device(model))
        if changed_end:
            half = len(one.completion) // 2
            ids = inputs["input_ids"]
            ids[:, len(one.prompt) + half :] = ids[:, len(one.prompt) + half :].flip(1)
            inputs["logprob_index"] = inputs["logprob_index"][: half + 1]
            inputs["logprob_targets"] = inputs["logprob_targets"][: half + 1]
        found.append(model(**inputs))
    return found


def _together(model: Any, sequences: list[Tokens], way: Way) -> list[Tensor]:
    if way == "shared":
        beside = [
            Tokens(one.prompt, after.completion)
            for one, after in zip(sequences, sequences[1:] + sequences[:1], strict=True)
        ]
        pairs = [one for pair in zip(beside, sequences, strict=True) for one in pair]
        return _call(model, collate_shared(pairs, always=True))[1::2]
    if way == "equal":
        return [_call(model, collate([one, _other(one)], way))[0] for one in sequences]
    return _call(model, _left(sequences) if way == "left" else collate(sequences, way))


def _leak(model: Any, sequences: list[Tokens], way: Way, together: list[Tensor]) -> float:
    """What the log-probabilities of every other sequence change when those beside them do. Nothing
    is rounded otherwise in batches of one shape, which shows leaks that rounding would hide."""
    worst = 0.0
    for kept in (0, 1):
        mixed = [one if i % 2 == kept else _other(one) for i, one in enumerate(sequences)]
        found = _together(model, mixed, way)
        worst = max(worst, distance(found[kept::2], together[kept::2]))
    return worst


def _other(one: Tokens) -> Tokens:
    return Tokens(one.prompt[::-1], one.completion[::-1])


def _call(model: Any, batch: TokenBatch) -> list[Tensor]:
    found: Tensor = model(**batch.on(device(model)))
    return list(torch.split(found, batch.cu_seqlens.diff().tolist()))


def _left(sequences: Sequence[Tokens]) -> TokenBatch:
    """Prompts end and completions begin in one column, as in TRL."""
    before = max(len(one.prompt) for one in sequences)
    width = before + max(len(one.completion) for one in sequences)
    ids = torch.zeros(len(sequences), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    index = []
    for row, one in enumerate(sequences):
        part = slice(before - len(one.prompt), before + len(one.completion))
        ids[row, part] = torch.tensor([*one.prompt, *one.completion])
        mask[row, part] = 1
        first = row * width + before - 1
        index.append(torch.arange(first, first + len(one.completion)))
    whole = collate(sequences, "padded")
    inputs = {"input_ids": ids, "attention_mask": mask}
    return TokenBatch(inputs, torch.cat(index), whole.targets, whole.cu_seqlens)


def _probes(model: Any) -> list[Tokens]:
    """Sequences of tokens without a meaning of their own, the same in every process.

    They are longer where the model looks at windows or blocks, so that what leaks behind one shows.
    """
    ids = ordinary_tokens(model)
    reach = window(model)
    wanted = _SIZES if reach <= 4 else ((6, 42 + reach), (3, 5 + reach), *_SIZES)
    sizes = [(prompt, size) for prompt, size in wanted if prompt + size <= longest(model)]
    most = max(map(sum, sizes))
    rng = torch.Generator()
    rng.manual_seed(0)
    drawn = ids[torch.randint(len(ids), (len(sizes), most), generator=rng)].tolist()
    pairs = zip(drawn, sizes, strict=True)
    return [Tokens(row[:prompt], row[prompt : prompt + size]) for row, (prompt, size) in pairs]


def window(model: Any) -> int:
    """The largest window or block that its config names, of those that a short probe can pass."""
    return _reach(inside(model).config.to_dict())


def _reach(config: Any, name: str = "", most: int | None = _LONGEST_REACH) -> int:
    if isinstance(config, dict):
        return max((_reach(value, key, most) for key, value in config.items()), default=0)
    if isinstance(config, list):
        return max((_reach(value, name, most) for value in config), default=0)
    near = isinstance(config, int) and (most is None or config <= most)
    return config if near and any(word in name for word in _REACHES) else 0


def _usual(found: list[float]) -> float:
    """The largest, but for one where a rounding decides between two words or experts."""
    return min(max(found), 10 * statistics.median(found))


def distance(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """The largest root mean square over a sequence; nan if there is one."""
    found = _distances(ours, theirs)
    return math.nan if any(map(math.isnan, found)) else max(found)


def _distances(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> list[float]:
    return [
        float((one[: len(other)] - other[: len(one)]).double().square().mean().sqrt())
        for one, other in zip(ours, theirs, strict=True)
    ]


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Without gradients and dropout; nothing drawn inside moves a random state."""
    here = device(model)
    devices = [here] if here.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices), evaluating(model):
        yield


@contextmanager
def rounded(model: Any) -> Iterator[None]:
    """Moves each number of the embeddings by one rounding of the arithmetic in use."""
    kind, dtype = device(model).type, next(model.parameters()).dtype
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    rng = torch.Generator()
    rng.manual_seed(1)

    def move(_module: Any, _inputs: Any, states: Tensor) -> Tensor:
        signs = torch.randint(0, 2, states.shape, generator=rng).to(states) * 2 - 1
        return states * (1 + torch.finfo(dtype).eps * signs)

    hook = inside(model).get_input_embeddings().register_forward_hook(move)
    try:
        yield
    finally:
        hook.remove()


def device(model: Any) -> torch.device:
    found: torch.device = next(inside(model).parameters()).device
    return found


def rope_limit(config: Any) -> int | None:
    """The tokens of a sequence beyond which rotary frequencies follow from the longest of a batch
    (long rope, dynamic NTK), or None. Longer ones go with others of their length alone."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    rope = getattr(config, "rope_parameters", None) or {}
    limits = []
    for part in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        kind = str(part.get("rope_type", ""))
        if kind == "longrope":
            limits.append(part.get("original_max_position_embeddings"))
        elif "dynamic" in kind:
            limits.append(config.max_position_embeddings)
    return min((limit for limit in limits if limit), default=None)


def reset_rope(model: Any) -> None:
    """Forgets the longest sequence, by which dynamic NTK rope scales all that come later."""
    for module in model.modules():
        for name in [name for name, _ in module.named_buffers(recurse=False)]:
            layer = name.removesuffix("original_inv_freq")
            if layer == name or not hasattr(module, "max_seq_len_cached"):
                continue
            kind = getattr(module, "rope_type", "")
            if "dynamic" in (kind.get(layer[:-1], "") if isinstance(kind, dict) else kind):
                setattr(module, f"{layer}inv_freq", getattr(module, name).clone())
                setattr(module, f"{layer}max_seq_len_cached", module.original_max_seq_len)
