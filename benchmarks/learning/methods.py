"""The names that runs and reports know methods by."""

from __future__ import annotations

from dataclasses import fields, replace

from .method import Method

_GROUP = Method("group")
_REPLAY = Method("replay", beta=0.1, updates=4)
_SQUARED = Method("squared", objective="squared", baseline="smoothed", beta=0.1)
_ENTROPY = Method("cross-entropy", objective="cross_entropy", baseline="smoothed", beta=1.0)
_PPO = Method("ppo", family="ppo")
_GRPO = Method("grpo", family="grpo")
_SFT = Method("sft", family="sft", offline="near", offline_share=1.0, learning_rate=1e-3)
_START = {"offline": "near", "sft_share": 0.75}


def _vary(base: Method, name: str, **changes: object) -> Method:
    return replace(base, name=name, **changes)  # type: ignore[arg-type]


METHODS = {
    method.name: method
    for method in (
        _GROUP,
        _vary(_GROUP, "group-0.1", beta=0.1),
        _vary(_GROUP, "group-untapered", taper=False),
        _vary(_GROUP, "group-leave-one-out", baseline="leave_one_out"),
        _vary(_GROUP, "group-rare", rare_power=2.0),
        _SQUARED,
        _vary(_SQUARED, "squared-raw", baseline="reference"),
        _vary(_SQUARED, "squared-running", baseline="running"),
        _vary(_SQUARED, "squared-leave-one-out", baseline="leave_one_out"),
        _ENTROPY,
        _vary(_ENTROPY, "cross-entropy-raw", baseline="reference"),
        _vary(_ENTROPY, "cross-entropy-offline", offline="near", offline_share=1.0),
        _vary(_ENTROPY, "cross-entropy-half", offline="diverse", offline_share=0.5),
        Method("advantage", objective="advantage", baseline="smoothed", beta=0.1),
        _vary(_GROUP, "half-diverse", offline="diverse", offline_share=0.5),
        _vary(_GROUP, "half-near", offline="near", offline_share=0.5),
        _vary(_GROUP, "half-near-online-q0", offline="near", offline_share=0.5,
              baseline="online_group"),
        _vary(_GROUP, "half-own", offline="own", offline_share=0.5),
        _REPLAY,
        _vary(_REPLAY, "replay-rare", rare_power=2.0),
        _vary(_REPLAY, "replay-16", updates=16),
        _vary(_REPLAY, "replay-recent", max_age=8),
        _vary(_GROUP, "guided", offline="near", guided_share=0.5),
        _vary(_GROUP, "sft-group", beta=0.1, **_START),
        _vary(_GROUP, "sft-group-rare", beta=0.1, rare_power=2.0, **_START),
        _SFT,
        _vary(_SFT, "sft-diverse", offline="diverse"),
        _vary(_PPO, "sft-ppo", **_START),
        _vary(_GRPO, "sft-grpo", **_START),
        Method("expert", family="expert"),
        _PPO,
        _vary(_PPO, "ppo-4", updates=4),
        _vary(_PPO, "ppo-decoupled", decoupled=True),
        _vary(_PPO, "ppo-offline", offline="near", offline_share=0.5, offline_weight=0.3),
        _GRPO,
        _vary(_GRPO, "grpo-4", updates=4),
        _vary(_GRPO, "grpo-offline", offline="near", offline_share=0.5, offline_weight=0.3),
    )
}  # fmt: skip


def method_named(text: str) -> Method:
    """One of METHODS, or a variation of one: "group:beta=0.1,updates=4", which is its name.

    Raises ValueError for another name, or a field that there is not.
    """
    name, _, changes = text.partition(":")
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {name!r}")
    if not changes:
        return METHODS[name]
    known = {field.name: str(field.type) for field in fields(Method) if field.name != "name"}
    values: dict[str, object] = {}
    for change in changes.split(","):
        field, _, value = change.partition("=")
        if field not in known:
            raise ValueError(f"method {text}: must change one of {', '.join(known)}, got {field!r}")
        values[field] = _parse(text, field, known[field], value)
    return _vary(METHODS[name], text, **values)


def _parse(text: str, field: str, kind: str, value: str) -> object:
    try:
        if kind == "bool":
            return {"True": True, "False": False}[value]
        if value == "None" and "None" in kind:
            return None
        if kind.startswith("int"):
            return int(value)
        return float(value) if kind.startswith("float") else value
    except (KeyError, ValueError):
        raise ValueError(f"method {text}: {field} must be a {kind}, got {value!r}") from None
