"""Settings from a YAML file and from the command line, as dataclasses.

    spo train --config run.yaml --learning_rate 1e-5 --mixture '{online: 0.5, human: 0.5}'

The keys of the file are the fields of the dataclasses, and a flag wins over the file. It reads the
flags of transformers.HfArgumentParser (`--name` or `--na-me`, `--no_name`, several words for a
list), but converts values by the type of the field, whichever side they come from: 1e-5 is a
number, `eval_strategy: no` is "no" and not False, and a flag may hold a list or a mapping.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from spo_ext.commands import Parser
from spo_ext.trainer.yaml_values import convert, is_boolean, is_list, load_yaml, type_name


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
