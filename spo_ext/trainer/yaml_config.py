"""Settings from a YAML file and from the command line, as dataclasses.

    spo train --config run.yaml --learning_rate 1e-5 --mixture '{online: 0.5, human: 0.5}'

The keys of the file are the fields of the dataclasses, and a flag wins over the file. It reads the
flags of transformers.HfArgumentParser (`--name` or `--na-me`, `--no_name`, several words for a
list), but converts values by the type of the field, whichever side they come from: 1e-5 is a
number, `eval_strategy: no` is "no" and not False, and a flag may hold a list or a mapping.
"""

from __future__ import annotations

import argparse
import collections.abc
import dataclasses
import difflib
import enum
import os
import re
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

from spo_ext.commands import Parser

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


def set_environment(argv: Sequence[str]) -> None:
    """Sets the variables of `env:` in the file of --config; what is set already is replaced.

    For before the imports: a library may read its variables only once. (PyTorch is there by then,
    so its own, such as OMP_NUM_THREADS, belong in the shell.) An unreadable file is left to
    parse.
    """
    try:
        content = _load(_config_path(argv))
    except (OSError, ValueError, argparse.ArgumentError):
        return
    os.environ.update(_environment(content, "--config"))


def parse(
    types: Sequence[type[Any]],
    argv: Sequence[str],
    *,
    prog: str = "spo train",
    description: str | None = None,
) -> tuple[Any, ...]:
    """One instance of each dataclass. A field of the same name in two of them is set in both.

    `env:` in the file sets environment variables. Relative paths stay as they are. Exits with
    status 2 and a message that names the field, where it stands and what it must be, if a key or
    flag is unknown, a value does not fit, a field without default is missing, or a dataclass
    refuses its values; and with status 0 after --help.
    """
    parser = _Parser(types, prog, description)
    given, unknown = parser.parse_known_args(list(argv))
    if unknown:
        parser.refuse("the command line", unknown[0], "a flag")
    values: dict[str, Any] = {}
    if given.config is not None:
        try:
            content = _load(given.config)
            os.environ.update(_environment(content, given.config))
        except (OSError, ValueError) as error:
            parser.error(str(error))
        for name, value in content.items():
            if name not in parser.hints:
                parser.refuse(given.config, str(name), "a field")
            values[name] = parser.value(f"{given.config}: {name}", name, value)
    for name, value in vars(given).items():
        if name in parser.hints:
            values[name] = parser.value(f"--{name}", name, value)
    return tuple(parser.build(kind, values) for kind in types)


class _Parser(Parser):
    """Flags for the fields of dataclasses, those of a class before those of its bases."""

    def __init__(self, types: Sequence[type[Any]], prog: str, description: str | None) -> None:
        super().__init__(
            prog=prog,
            usage="%(prog)s [--config FILE] [--NAME VALUE ...]",
            description=description,
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,  # only what was given is in the namespace
        )
        self.add_argument(
            "--config", metavar="FILE", default=None, help="YAML file; flags win over it"
        )
        self.hints: dict[str, Any] = {}
        for kind in types:
            hints = typing.get_type_hints(kind)
            fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
            for owner in kind.__mro__:
                own = [name for name in vars(owner).get("__annotations__", {}) if name in fields]
                group = self.add_argument_group(owner.__name__) if own else self
                for name in own:
                    if name not in self.hints:
                        # HfArgumentParser's word for: the flag alone means true (fsdp).
                        alone = fields[name].metadata.get("const") is True
                        self.hints[name] = bool | hints[name] if alone else hints[name]
                        _add_flags(group, fields[name], self.hints[name])

    def value(self, source: str, name: str, value: object) -> Any:
        try:
            return convert(self.hints[name], value)
        except ValueError:
            self.error(f"{source} must be {type_name(self.hints[name])}, got {value!r}")

    def build(self, kind: type[Any], values: dict[str, Any]) -> Any:
        fields = [field for field in dataclasses.fields(kind) if field.init]
        missing = [
            field.name for field in fields if field.name not in values and _default(field) is None
        ]
        if missing:
            self.error(f"no value for {', '.join(missing)} ({kind.__name__}); it has no default")
        try:
            return kind(
                **{field.name: values[field.name] for field in fields if field.name in values}
            )
        except (ValueError, TypeError, ImportError) as error:
            self.error(f"{kind.__name__}: {error}")

    def refuse(self, source: str, name: str, what: str) -> NoReturn:
        words = name.lstrip("-").partition("=")[0].replace("-", "_")
        near = difflib.get_close_matches(words, [*self.hints, "config", "env"], n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        self.error(f"{source}: {name} is not {what} of {self.prog}{hint}")


def _add_flags(group: Any, field: dataclasses.Field[Any], hint: Any) -> None:
    options = dict(field.metadata)
    aliases = options.get("aliases", [])
    flags = list(dict.fromkeys([f"--{field.name}", f"--{field.name.replace('_', '-')}"])) + (
        [aliases] if isinstance(aliases, str) else list(aliases)
    )
    settings: dict[str, Any] = {"dest": field.name, "metavar": type_name(hint)}
    if is_boolean(hint) or options.get("const") is True:
        settings |= {"nargs": "?", "const": True}
    elif is_list(hint):
        settings["nargs"] = "+"
        if options.get("repeat"):  # each flag adds to those before it
            settings["action"] = "extend"
    default = _default(field)
    text = "required" if default is None else f"default: {default}"
    group.add_argument(*flags, help=f"{options.get('help') or ''} ({text})".strip(), **settings)
    if is_boolean(hint) and field.default is True:
        off = [f"--no_{field.name}", f"--no-{field.name.replace('_', '-')}"]
        group.add_argument(*off, dest=field.name, action="store_false", help=argparse.SUPPRESS)


def _default(field: dataclasses.Field[Any]) -> str | None:
    """For --help; None: a required field."""
    if field.default is not dataclasses.MISSING:
        return str(getattr(field.default, "value", field.default)).replace("%", "%%")
    if field.default_factory is not dataclasses.MISSING:
        return str(field.default_factory()).replace("%", "%%")
    return None


def _config_path(argv: Iterable[str]) -> str | None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config")
    path: str | None = parser.parse_known_args(list(argv))[0].config
    return path


def _load(path: str | None) -> dict[Any, Any]:
    if path is None:
        return {}
    content = load_yaml(Path(path).read_text(encoding="utf-8"), path)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{path} must be a mapping of fields to values, got {content!r}")
    return content


def _environment(content: dict[Any, Any], source: str) -> dict[str, str]:
    """Takes `env` out of the content."""
    variables = content.pop("env", None) or {}
    if not isinstance(variables, dict):
        raise ValueError(f"{source}: env must be a mapping of names to values, got {variables!r}")
    return {str(name): str(value) for name, value in variables.items()}
