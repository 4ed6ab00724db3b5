"""From settings classes to command lines: the parser of a class, over the YAML file of `--config`."""

from __future__ import annotations

import argparse
import types
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, fields
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from diffusers_ext.core.settings import Settings, declaration, flag_name, with_new_names
from diffusers_ext.training.run import config_file
from diffusers_ext.training.run.command_lines import OneLineParser
from diffusers_ext.training.run.config_file import parse_arguments

SettingsType = TypeVar("SettingsType", bound=Settings)


def settings_parser(settings_class: type[Settings], description: str | None = None) -> argparse.ArgumentParser:
    """The parser of all flags of a settings class; what must be given it leaves to `parse_settings`."""
    parser = OneLineParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_settings(parser, settings_class)
    return parser


def add_settings(parser: argparse.ArgumentParser, settings_class: type[Settings]) -> None:
    """Add the flags of a class in the groups of the classes that it is made of, in their order."""
    hints, by_name = get_type_hints(settings_class), {f.name: f for f in fields(settings_class)}
    owners = {
        name: owner
        for owner in settings_class.__mro__  # the last one has declared the name first
        for name in vars(owner).get("__annotations__", {})
        if name in by_name
    }
    groups: dict[str | None, argparse._ActionsContainer] = {None: parser}
    for owner in (*settings_class.__mro__[1:], settings_class):
        title = getattr(owner, "title", None)
        for name, one in by_name.items():
            if owners[name] is not owner:
                continue
            if title not in groups:
                groups[title] = parser.add_argument_group(title)
            _add_flag(groups[title], one, hints[name])


def parse_settings(
    settings_class: type[SettingsType],
    description: str | None,
    input_args: Sequence[str] | None = None,
    read_block: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    shared: Sequence[type[Settings]] = (),
) -> SettingsType:
    """Settings of a command line, over the YAML file of `--config`.

    Args:
        settings_class: what the script reads.
        description: of the script.
        input_args: command line; `None` takes the process's.
        read_block: turns nested blocks of the file into flat names.
        shared: classes of all scripts that share one file: their names are passed over there.

    Raises:
        ValueError: of the class, for values that break its rules.
    """

    args = parse_arguments(
        settings_parser(settings_class, description),
        input_args,
        required_names(settings_class),
        _reader(settings_class, read_block),
        shared,
    )
    return settings_of(args, settings_class)


def settings_of(args: argparse.Namespace, settings_class: type[SettingsType]) -> SettingsType:
    """The settings that parsed flags of a class stand for."""
    return settings_class(**{one.name: getattr(args, flag_name(one)) for one in fields(settings_class)})


def file_flags(
    parser: argparse.ArgumentParser,
    input_args: Sequence[str],
    settings_class: type[Settings],
    read_block: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    shared: Sequence[type[Settings]] = (),
) -> list[str]:
    """What the file of `--config` holds and the command line does not give, as flags of a class."""
    return config_file.file_flags(parser, input_args, _reader(settings_class, read_block), shared)


def required_names(settings_class: type[Settings]) -> list[str]:
    """Names of the flags that must be given."""
    return [
        flag_name(one) for one in fields(settings_class) if one.default is MISSING and one.default_factory is MISSING
    ]


def _reader(
    settings_class: type[Settings], read_block: Callable[[dict[str, Any]], dict[str, Any]] | None
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def read(values: dict[str, Any]) -> dict[str, Any]:
        values = values if read_block is None else read_block(values)
        return with_new_names(values, settings_class)

    return read


def _add_flag(group: argparse._ActionsContainer, one: Field, hint: Any) -> None:
    declared = declaration(one)
    default = None if one.default is MISSING else one.default
    if one.default_factory is not MISSING:
        default = one.default_factory()
    options: dict[str, Any] = {"dest": flag_name(one), "default": default, "help": declared.help}
    kind = _without_none(hint)
    if kind is bool:
        with_no = declared.with_no or default is not False
        options["action"] = argparse.BooleanOptionalAction if with_no else "store_true"
    else:
        several = declared.several or get_origin(kind) is list
        if get_origin(kind) is list:
            (kind,) = get_args(kind)
        options["type"] = kind if kind in (int, float) else None
        options["choices"] = declared.choices
        if declared.repeated:
            options["action"] = "append"
        elif several:
            options["nargs"] = "+"
    names = (flag_name(one), *declared.aliases, *declared.old_names)
    group.add_argument(*(f"--{name}" for name in names), **options)


def _without_none(hint: Any) -> Any:
    """`int` of `int | None`; a type of several words as it is."""
    if get_origin(hint) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(hint) if kind is not type(None)]
        return kinds[0] if len(kinds) == 1 else hint
    return hint
