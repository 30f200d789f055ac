"""Values of a YAML file or a command line, converted to the types of dataclass fields."""

from __future__ import annotations

import collections.abc
import enum
import re
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

_TRUE = ("true", "yes", "on", "t", "y", "1")
_FALSE = ("false", "no", "off", "f", "n", "0")
_NULL = ("null", "~", "")
_SEQUENCES = (list, tuple, set, collections.abc.Sequence, collections.abc.Iterable)
_MAPPINGS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)


def load_yaml(text: str, source: str) -> Any:
    """As YAML 1.2 reads it: 1e-5 is a number, `no` and 2026-01-01 are strings.

    Raises ValueError, naming the source and the line, for what is not YAML and for a key that
    stands twice.
    """
    try:
        import yaml
    except ImportError as error:
        raise ImportError(f"{error}. Install it: pip install pyyaml") from None

    class Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
        # Tables of the class: those of SafeLoader must not change.
        yaml_implicit_resolvers = {
            first: [
                pair for pair in pairs if not pair[0].endswith((":bool", ":float", ":timestamp"))
            ]
            for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen: list[Any] = []
            for key_node, _ in node.value:
                key = self.construct_object(key_node, deep=True)
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"{key} stands twice", key_node.start_mark
                    )
                seen.append(key)
            return super().construct_mapping(node, deep)

    Loader.add_implicit_resolver("tag:yaml.org,2002:bool", _BOOLEAN, list("tTfF"))
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{source}: {error}") from None


_BOOLEAN = re.compile(r"(?:true|True|TRUE|false|False|FALSE)$")
_FLOAT = re.compile(
    r"[-+]?(?:\d+\.\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+)$"
    r"|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
)


def convert(hint: Any, value: Any) -> Any:
    """A value as the type of a field.

    A string is read as what the type asks for, so that files, which hold values, and command lines,
    which hold words, give the same. Raises ValueError if it does not fit.
    """
    origin = get_origin(hint) or hint
    if hint is Any:
        return _structure(value) if isinstance(value, str) else value
    if origin in (Union, types.UnionType):
        return _convert_union(get_args(hint), value)
    if origin is Literal:
        return _first(choice for choice in get_args(hint) if _same(choice, value))
    if origin in _MAPPINGS:
        return _convert_mapping(hint, value)
    if origin in _SEQUENCES:
        return _convert_sequence(hint, origin, value)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return value if isinstance(value, hint) else hint(value)
    return _convert_scalar(hint, value)


def is_boolean(hint: Any) -> bool:
    """Whether a flag may stand without a value."""
    return hint is bool or set(get_args(hint)) == {bool, types.NoneType}


def is_list(hint: Any) -> bool:
    """Whether a flag may have several values."""
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return any((get_origin(member) or member) in _SEQUENCES for member in members)


def type_name(hint: Any) -> str:
    """For people: "float", "one of a, b", "mapping or str"."""
    origin = get_origin(hint) or hint
    if origin in (Union, types.UnionType):
        names = [type_name(member) for member in get_args(hint)]
        return " or ".join(dict.fromkeys(names))
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in get_args(hint))
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return "one of " + ", ".join(str(choice.value) for choice in hint)
    if origin in _MAPPINGS:
        return "mapping"
    if origin in _SEQUENCES:
        return "list"
    return "null" if hint is types.NoneType else str(getattr(origin, "__name__", origin))


def _convert_union(members: tuple[Any, ...], value: Any) -> Any:
    # A string fits str always, so that is tried last.
    ordered = sorted(members, key=lambda member: (member is str, member is bool))
    if isinstance(value, list) and len(value) == 1 and str in members:
        value = value[0]  # one word, from the command line
    word = str in members and isinstance(value, str) and not value.lstrip().startswith(("[", "{"))
    for member in ordered:
        if word and (get_origin(member) or member) in (*_SEQUENCES, *_MAPPINGS):
            continue  # a list of one word only where a word is not allowed
        try:
            return convert(member, value)
        except ValueError:
            continue
    raise ValueError(value)


def _convert_mapping(hint: Any, value: Any) -> dict[Any, Any]:
    found = _structure(value)
    if not isinstance(found, dict):
        raise ValueError(value)
    arguments = get_args(hint)
    if not arguments:
        return found
    return {convert(arguments[0], key): convert(arguments[1], item) for key, item in found.items()}


def _convert_sequence(hint: Any, origin: Any, value: Any) -> Any:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        value = _structure(value[0])  # one word, from the command line, may be the whole list
    items = list(value) if isinstance(value, (list, tuple, set)) else [_not_null(value)]
    arguments = [item for item in get_args(hint) if item is not Ellipsis] or [Any]
    if len(arguments) == 1:
        arguments *= len(items)
    if len(arguments) != len(items):
        raise ValueError(value)
    converted = [convert(kind, item) for kind, item in zip(arguments, items, strict=True)]
    return origin(converted) if origin in (tuple, set) else converted


def _convert_scalar(hint: Any, value: Any) -> Any:
    boolean = isinstance(value, bool)
    number = isinstance(value, (int, float)) and not boolean
    text = value if isinstance(value, str) else None
    if hint is types.NoneType and (value is None or text in _NULL):
        return None
    if hint is bool and (boolean or text is not None):
        return value if boolean else _boolean(str(text))
    if hint is int and text is not None:
        return int(text)
    if hint is int and number and float(value).is_integer():
        return int(value)
    if hint is float and (number or text is not None):
        return float(value)
    if hint is str and (number or boolean or text is not None):
        return str(value)
    if hint is Path and text is not None:
        return Path(text)
    if isinstance(hint, type) and isinstance(value, hint) and not boolean:
        return value
    raise ValueError(value)


def _boolean(text: str) -> bool:
    if text.lower() in _TRUE:
        return True
    if text.lower() in _FALSE:
        return False
    raise ValueError(text)


def _structure(value: Any) -> Any:
    return load_yaml(value, "value") if isinstance(value, str) else value


def _same(choice: Any, value: Any) -> bool:
    return (type(choice), choice) == (type(value), value) or str(choice) == value


def _first(found: Any) -> Any:
    for item in found:
        return item
    raise ValueError("none fits")


def _not_null(value: Any) -> Any:
    if value is None or isinstance(value, dict):
        raise ValueError(value)
    return value
