"""From settings classes to command lines: the parser of a class, over the YAML file of `--config`."""

from __future__ import annotations

import argparse
import re
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from typing import Any, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from diffusers_ext.core.settings import Settings, declaration, did_you_mean, flag_name, with_new_names
from diffusers_ext.training.run import config_file
from diffusers_ext.training.run.config_file import parse_arguments

TRACEBACK_FLAG, OVERWRITE_FLAG = "--traceback", "--overwrite_output_dir"
WRONG_USAGE = 2


class OneLineParser(argparse.ArgumentParser):
    """An `ArgumentParser` that shows no usage with an error, and finds the nearest name.

    Args:
        refuse_unknown: end at an unknown flag here, where this parser's flags are known, and not in the parser of the
            whole command line; for sub-commands.
        arguments: of `ArgumentParser`.
    """

    def __init__(self, *args: Any, refuse_unknown: bool = False, **arguments: Any) -> None:
        super().__init__(*args, **arguments)
        self.refuse_unknown = refuse_unknown
        self._line: Sequence[str] = ()

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As in the base class."""
        self._line = sys.argv[1:] if args is None else list(args)
        found, rest = super().parse_known_args(args, namespace)
        if rest and self.refuse_unknown:
            self._refuse(rest)
        return found, rest

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """As in the base class; an unknown flag is told with the nearest one."""
        found, rest = self.parse_known_args(args, namespace)
        if rest:
            self._refuse(rest)
        return found

    def error(self, message: str) -> NoReturn:
        """End with one line, and exit code 2; with `--traceback` also say from where."""
        if message.startswith("the following arguments are required"):
            message += f".{self._meant(self._line)}"  # a misspelt one looks like a missing one
        if TRACEBACK_FLAG in self._line:
            traceback.print_stack()
        self.exit(WRONG_USAGE, f"error: {' '.join(message.split())}\n")

    def _refuse(self, rest: Sequence[str]) -> NoReturn:
        self.error(f"unrecognized arguments: {' '.join(rest)}.{self._meant(rest)}")

    def _meant(self, words: Sequence[str]) -> str:
        """The flags that are nearest to the unknown ones among some words."""
        known = [option for action in self._actions for option in action.option_strings]
        flags = [word.partition("=")[0] for word in words if word.startswith("-")]
        return did_you_mean([flag for flag in flags if flag not in known], known)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            meant = did_you_mean(str(value), map(str, action.choices or ()))
            raise argparse.ArgumentError(action, f"{error.message}.{meant}") from error


def add_overwrite_argument(parser: argparse._ActionsContainer) -> None:
    """Permission to replace a result."""
    parser.add_argument(
        OVERWRITE_FLAG,
        action="store_true",
        help="replace a finished result, which is refused without it; other files stay",
    )


_NAME = re.compile(r"`([A-Za-z_][A-Za-z_0-9]*)`")


def user_errors() -> tuple[type[BaseException], ...]:
    """Wrong input, missing files or extras, refusals of the Hub, a lost connection, no memory, NaN."""
    from huggingface_hub.utils import httpx
    from safetensors import SafetensorError
    from torch import OutOfMemoryError

    # What the Hub lacks or refuses is an `OSError`, a lost connection is not.
    return (ValueError, TypeError, OSError, ImportError, httpx.HTTPError, SafetensorError,
            FloatingPointError, OutOfMemoryError)  # fmt: skip


def error_line(error: BaseException, args: argparse.Namespace, flags: Mapping[str, str]) -> str:
    """What an error says, in one line, in the words of the command line.

    Functions name their parameters. Here a name becomes the flag of that name. Where the value that was refused is
    another argument's, the error is about that one: `pretrained_model_name_or_path` of statistics is `--statistics`.

    Args:
        error: any.
        args: parsed arguments.
        flags: what each of them is called on the command line.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        text = f"{error.strerror}: {error.filename}"
    first = _NAME.match(text)
    if first is not None:
        refused = text.partition(", got ")[2]
        about = _argument_of(refused, first[1], vars(args), flags)
        if about is not None:
            text = f"`{flags[about]}`{text[first.end() :]}"
    return _NAME.sub(lambda match: f"`{flags.get(match[1], match[1])}`", text)


def _argument_of(refused: str, name: str, values: Mapping[str, Any], flags: Mapping[str, str]) -> str | None:
    """The argument whose value an error is about, if that is not the one of the name it uses."""
    if name in flags and any(_begins(refused, text) for text in _texts(values.get(name))):
        return None
    found = [
        other for other in flags if any(len(text) > 1 and _begins(refused, text) for text in _texts(values.get(other)))
    ]
    return found[0] if len(found) == 1 else None


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        yield from (item for item in value if isinstance(item, str))


def _begins(refused: str, text: str) -> bool:
    """Whether what follows `got` is this text, and not a longer one."""
    return any(
        refused.startswith(form) and not re.match(r"[\w/-]", refused[len(form) :]) for form in (text, repr(text))
    )


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
