"""Options: a dataclass, filled from a YAML file and the command line.

A field is written `name: type = option(default, "one line of meaning")`. Its name is the option's name on the command
line (`--name value`), in the YAML file (`name: value`) and in Python. The command line overrides the file.
"""

import argparse
import dataclasses
import difflib
import enum
import json
import os
import shlex
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import numpy as np
import torch

T = TypeVar("T")

# in lower case, those of transformers' string_to_bool
TRUTH = {**dict.fromkeys("true t yes y 1".split(), True), **dict.fromkeys("false f no n 0".split(), False)}


def option(default: T, meaning: str, *, alias: str | None = None) -> T:
    """A dataclass field with this default and meaning; `alias` is a second name on the command line."""
    metadata = {"meaning": meaning, "alias": alias}
    return dataclasses.field(default=default, metadata=metadata)


def given_options(options: type, argv: Sequence[str], *, prog: str, description: str) -> dict[str, Any]:
    """The options that a command line sets, name to converted value; those it leaves out are absent.

    Args:
        options: the dataclass whose fields are the options.
        argv: the words after the command's name. `--config FILE` reads a YAML file first.
        prog, description: shown by `--help`.
    Raises:
        SystemExit: as argparse does, after printing what is wrong: an unknown name, a value of another type.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        usage=f"{prog} [--config FILE] [--OPTION VALUE] ...",
        formatter_class=partial(argparse.HelpFormatter, max_help_position=36),
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", metavar="FILE", type=Path, help="a YAML file of these options; this line overrides it"
    )
    kinds = _kinds(options)
    for field in dataclasses.fields(options):
        _add_argument(parser, field, kinds[field.name])
    # --learning-rate is --learning_rate, as in the transformers command lines
    argv = [_underscored(word) for word in argv]
    parsed, unknown = parser.parse_known_args(argv)
    line = vars(parsed)
    config = line.pop("config")
    try:
        if unknown:
            raise ValueError(_unknown([word for word in unknown if word.startswith("--")] or unknown[:1], kinds))
        given = read_yaml(options, config) if config else {}
        given.update({name: convert(name, value, kinds[name]) for name, value in line.items()})
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return given


def read_yaml(options: type, path: str | os.PathLike[str]) -> dict[str, Any]:
    """The options that a YAML file sets, by their names or aliases, name to converted value.

    Raises:
        ValueError: all unknown keys, values of another type, and options by both their names, each named.
    """
    import yaml  # a requirement of the trainer only

    with open(path, encoding="utf-8") as file:
        try:
            found = yaml.safe_load(file)
        except yaml.YAMLError as error:
            raise ValueError(f"{path}: not YAML: {error}") from error
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        raise ValueError(f"{path}: wanted one `option: value` a line; got {type(found).__name__}")
    kinds = _kinds(options)
    aliases = {field.metadata["alias"]: field.name for field in dataclasses.fields(options)}
    given: dict[str, Any] = {}
    unknown = [str(key) for key in found if aliases.get(key, key) not in kinds]
    # a file written for another trainer has many, and whoever brings it wants to hear of all at once
    wrong = [_unknown(unknown, kinds)] if unknown else []
    for key, value in found.items():
        name = aliases.get(key, key)
        if name in given:
            wrong.append(f"{name} is given by both its names")
        elif name in kinds:
            try:
                given[name] = convert(name, value, kinds[name])
            except ValueError as error:
                wrong.append(str(error))
    if wrong:
        raise ValueError(f"{path}: {'; '.join(wrong)}")
    return given


def _kinds(options: type) -> dict[str, Any]:
    """The type of each field; hints alone would name class variables too."""
    hints = typing.get_type_hints(options)
    return {field.name: hints[field.name] for field in dataclasses.fields(options)}


def as_command(prog: str, options: Any) -> str:
    """The command line that sets these options; those at their default are left out."""
    words: list[str] = []
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if value != field.default:
            words += [f"--{field.name}", *map(_as_text, value if isinstance(value, list) else [value])]
    return f"{prog} {shlex.join(words)}"


def convert(name: str, value: Any, kind: Any) -> Any:
    """`value`, a text or what YAML made of it, as the annotated type `kind`; a ValueError says what was wanted."""
    try:
        return _as(value, kind)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: wanted {_describe(kind)}; got {value!r}") from None


def settle(options: Any) -> None:
    """Gives options set in Python the types that the command line's have.

    An enum's member becomes its value, a path or a torch.dtype text, a number of NumPy's Python's own, one where a list
    is wanted a list of it. A checkpoint, which remembers the options, can hold nothing else.

    Raises:
        ValueError: a value of another type than the option's, said as the command line says it.
    """
    for name, kind in _kinds(type(options)).items():
        try:
            setattr(options, name, convert(name, _plain(getattr(options, name)), kind))
        except ValueError as error:
            raise ValueError(f"{options.recipe}: {error}") from None


def _members(kind: Any) -> tuple[Any, ...]:
    """Of a union, its members; of another type, itself."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.item() if isinstance(value, np.generic) else value


def name_of(function: Callable[..., Any]) -> str:
    """Its own name, or that of its class: a partial and an object with __call__ have none."""
    return getattr(function, "__name__", type(function).__name__)


def _as_text(value: Any) -> str:
    if isinstance(value, float):
        return str(value).removesuffix(".0")
    if isinstance(value, dict):
        return json.dumps(value)
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _as(value: Any, kind: Any) -> Any:
    if len(members := _members(kind)) > 1:
        if types.NoneType in members and (value is None or str(value).lower() in ("none", "null")):
            return None
        for member in members:
            try:
                return _as(value, member)
            except (TypeError, ValueError):
                continue
        _refuse()
    if get_origin(kind) is Callable:
        return value if callable(value) else _refuse()
    if get_origin(kind) is Literal:
        word = "no" if value is False else value  # YAML reads a bare `no` as false
        return word if isinstance(word, str) and word in get_args(kind) else _refuse()
    if get_origin(kind) is list:
        return [_as(item, get_args(kind)[0]) for item in (value if isinstance(value, list) else [value])]
    if get_origin(kind) is dict:
        found = json.loads(value) if isinstance(value, str) else value
        return found if isinstance(found, dict) else _refuse()
    if kind is bool:
        if isinstance(value, str):
            return TRUTH[value.lower()] if value.lower() in TRUTH else _refuse()
        return value if isinstance(value, bool) else _refuse()
    # YAML reads 1e-6, without a point, as text: text is therefore welcome where a number is wanted
    if kind in (int, float) and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        return kind(value) if kind is float or not isinstance(value, float) else _refuse()
    if kind is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    return _refuse()


def _refuse() -> typing.NoReturn:
    raise TypeError


def _describe(kind: Any) -> str:
    if len(members := _members(kind)) > 1:
        return " or ".join(map(_describe, members))
    if get_origin(kind) is Callable:
        return "a function"
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    if get_origin(kind) is list:
        return f"a list of {_describe(get_args(kind)[0])}"
    if get_origin(kind) is dict:
        return "a mapping, as JSON"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", types.NoneType: "none"}
    return names.get(kind, str(kind))


def _add_argument(parser: argparse.ArgumentParser, field: dataclasses.Field[Any], kind: Any) -> None:
    members = _members(kind)
    how: dict[str, Any] = {}
    if bool in members:
        how = {"nargs": "?", "const": True}
    elif any(get_origin(member) is list for member in members):
        how = {"nargs": "+", "action": _OneOrMore}
    alias = field.metadata["alias"]
    parser.add_argument(
        f"--{field.name}",
        *([f"--{alias}"] if alias else []),
        dest=field.name,
        default=argparse.SUPPRESS,
        metavar=field.name.rsplit("_", 1)[-1].upper(),
        help=f"{field.metadata['meaning']} ({_as_text(field.default)})".replace("%", "%%"),
        **how,
    )


class _OneOrMore(argparse.Action):
    """One word stays a word, several are a list."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, values[0] if len(values) == 1 else values)


def _underscored(word: str) -> str:
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value if word.startswith("--") else word


def _unknown(names: Sequence[str], kinds: Mapping[str, Any]) -> str:
    words = [name.partition("=")[0] for name in names]
    near = [difflib.get_close_matches(word.lstrip("-"), kinds, n=1) for word in words]
    if len(words) == 1:
        hint = f"did you mean {near[0][0]!r}?" if near[0] else f"one of {', '.join(kinds)}"
        return f"unknown option {words[0]!r}; {hint}"
    told = [repr(word) + (f" (did you mean {one[0]!r}?)" if one else "") for word, one in zip(words, near, strict=True)]
    return f"unknown options {', '.join(told)}: --help lists those that there are"
