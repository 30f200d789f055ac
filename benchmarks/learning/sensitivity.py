"""What one number does to methods: the batches between two syncs, or the learning rate."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields, replace

from .method import Method
from .settings import Setting
from .tables import Pair, Record, Series

_FEWEST_VALUES = 3  # that make a curve


def _defaults(kind: type[Method] | type[Setting]) -> dict[str, object]:
    return {f.name: f.default for f in fields(kind) if f.default is not MISSING}


# A field that there was not when a run was made is as it is by default.
_OF_METHODS, _OF_SETTINGS = _defaults(Method), _defaults(Setting)


@dataclass(frozen=True)
class Sensitivity:
    """A curve for each method, all over the same pairs of seeds.

    quantity: what is varied. curves: (value, runs) in rising order, by the name of the method.
    """

    title: str
    quantity: str
    curves: dict[str, list[tuple[float, Series]]]


def sensitivities(records: Sequence[Record]) -> list[Sensitivity]:
    """What the records have at three values or more, with all else equal."""
    found: list[Sensitivity] = []
    for split in dict.fromkeys(record["split"] for record in records):
        of_split = [record for record in records if record["split"] == split]
        for name, quantity, value, rest in (
            ("Stale behaviour", "batches between two syncs", _sync_every, _but_sync_every),
            ("Learning rate", "learning rate", _learning_rate, _but_learning_rate),
        ):
            curves = _curves(of_split, value, rest)
            if curves:
                found.append(Sensitivity(f"{name}, {split} problems", quantity, curves))
    return found


def _curves(
    records: Sequence[Record], value: Callable[[Record], float], rest: Callable[[Record], str]
) -> dict[str, list[tuple[float, Series]]]:
    alike: dict[str, dict[float, list[Record]]] = {}
    for record in records:
        alike.setdefault(rest(record), {}).setdefault(value(record), []).append(record)
    curves = {}
    for values in alike.values():
        if len(values) >= _FEWEST_VALUES:
            # A variation is called by what it varies: the shortest name is the method's.
            runs = [run for column in values.values() for run in column]
            name = min((run["method"] for run in runs), key=len)
            if name in curves:  # in another setting, or of another length
                name += f" ({runs[0]['setting']}, {runs[0]['steps']} steps)"
            curves[name] = [(x, Series(name, tuple(values[x]))) for x in sorted(values)]
    return _on_common_pairs(curves)


def _on_common_pairs(
    curves: dict[str, list[tuple[float, Series]]],
) -> dict[str, list[tuple[float, Series]]]:
    every = [set(series.by_pair) for curve in curves.values() for _, series in curve]
    shared: set[Pair] = set.intersection(*every) if every else set()
    if not shared:
        return {}
    return {
        name: [
            (x, replace(series, runs=tuple(series.by_pair[pair] for pair in sorted(shared))))
            for x, series in curve
        ]
        for name, curve in curves.items()
    }


def _sync_every(record: Record) -> float:
    of_setting = record["setting_settings"].get("sync_every")
    return float(of_setting or _method(record)["sync_every"])


def _but_sync_every(record: Record) -> str:
    setting = {**_OF_SETTINGS, **record["setting_settings"]}
    kept = {key: setting[key] for key in setting if key not in ("name", "about", "sync_every")}
    return _text(record["method"], record["steps"], kept)


def _learning_rate(record: Record) -> float:
    return float(_method(record)["learning_rate"])


def _but_learning_rate(record: Record) -> str:
    method = _method(record)
    kept = {key: method[key] for key in method if key not in ("name", "learning_rate")}
    return _text(record["setting"], record["steps"], kept)


def _method(record: Record) -> dict[str, object]:
    return {**_OF_METHODS, **record["method_settings"]}


def _text(*parts: object) -> str:
    return json.dumps(parts, sort_keys=True)
