"""From settings classes to command lines: the parser of a class, over the YAML file of `--config`."""

from __future__ import annotations

import argparse
import re
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from diffusers_ext.core.settings import Settings, declaration, did_you_mean, flag_name, setting_names, with_new_names
from diffusers_ext.core.text_files import read_yaml
from diffusers_ext.documented_names import DOCUMENTED_FLAGS

TRACEBACK_FLAG = "--traceback"
WRONG_USAGE = 2
SettingsType = TypeVar("SettingsType", bound=Settings)
ReadBlock = Callable[[dict[str, Any]], dict[str, Any]]  # nested blocks of a file to flat names


class OneLineParser(argparse.ArgumentParser):
    """An `ArgumentParser` that shows no usage with an error, and finds the nearest name.

    `refuse_unknown` makes a sub-command's parser, which knows its own flags, end at an unknown one, before the parser
    of the whole command line does.
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


_NAME = re.compile(r"`([A-Za-z_][A-Za-z_0-9]*)`")


def user_errors() -> tuple[type[BaseException], ...]:
    """Wrong input, missing files or extras, refusals of the Hub, a lost connection, no memory, NaN."""
    from safetensors import SafetensorError
    from torch import OutOfMemoryError

    from diffusers_ext.hub.connection import HTTP_ERROR

    # What the Hub lacks or refuses is an `OSError`, a lost connection is not.
    return (ValueError, TypeError, OSError, ImportError, HTTP_ERROR, SafetensorError,
            FloatingPointError, OutOfMemoryError)  # fmt: skip


def error_line(error: BaseException, args: argparse.Namespace, flags: Mapping[str, str]) -> str:
    """What an error says, in one line, in the words of the command line: `flags` by names of `args`.

    Functions name their parameters. Here a name becomes the flag of that name. Where the value that was refused is
    another argument's, the error is about that one: `pretrained_model_name_or_path` of statistics is `--statistics`.
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
    yield from (item for item in (value if isinstance(value, list) else [value]) if isinstance(item, str))


def _begins(refused: str, text: str) -> bool:
    """Whether what follows `got` is this text, and not a longer one."""
    return any(
        refused.startswith(form) and not re.match(r"[\w/-]", refused[len(form) :]) for form in (text, repr(text))
    )


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


def required_names(settings_class: type[Settings]) -> list[str]:
    """Names of the flags that must be given."""
    return [
        flag_name(one) for one in fields(settings_class) if one.default is MISSING and one.default_factory is MISSING
    ]


def settings_of(args: argparse.Namespace, settings_class: type[SettingsType]) -> SettingsType:
    """The settings that parsed flags of a class stand for."""
    return settings_class(**{one.name: getattr(args, flag_name(one)) for one in fields(settings_class)})


def parse_settings(
    settings_class: type[SettingsType],
    description: str | None,
    input_args: Sequence[str] | None = None,
    read_block: ReadBlock | None = None,
    shared: Sequence[type[Settings]] = (),
) -> SettingsType:
    """Settings of a command line, over the YAML file of `--config`; raises `ValueError` for what breaks their rules.

    Arguments as of `parse_arguments`.
    """
    parser, read_block = settings_parser(settings_class, description), file_reader(settings_class, read_block)
    args = parse_arguments(parser, input_args, required_names(settings_class), read_block, shared)
    return settings_of(args, settings_class)


def file_reader(settings_class: type[Settings], read_block: ReadBlock | None) -> ReadBlock:
    """Turns the values of a file into flat ones with today's names."""
    return lambda values: with_new_names(values if read_block is None else read_block(values), settings_class)


def parse_arguments(
    parser: argparse.ArgumentParser,
    input_args: Sequence[str] | None,
    required: Sequence[str],
    read_block: ReadBlock | None = None,
    groups: Sequence[type[Settings]] = (),
) -> argparse.Namespace:
    """Parse flags over an optional YAML file.

    What the file holds is parsed as if it were written as flags, with the same types and choices; a flag of the
    command line replaces it.

    Args:
        input_args: command line; `None` takes the process's.
        required: names that the file or the flags must give.
        read_block: turns nested blocks of the file into flat argument names.
        groups: of all scripts that share one file. Names in them that `parser` lacks are another script's and are
            passed over; all other names are errors.
    """
    input_args = sys.argv[1:] if input_args is None else list(input_args)
    input_args = [*file_flags(parser, input_args, read_block, groups), *input_args]
    replaced = replaced_flag(parser, input_args)
    if replaced is not None:
        parser.error(replaced)
    args = parser.parse_args(input_args)
    missing = [name for name in required if getattr(args, name) is None]
    if missing:
        parser.error(f"these arguments must be given: {', '.join('--' + name for name in missing)}")
    if getattr(args, "report_to", None) == "wandb" and args.hub_token:
        parser.error("`--hub_token` must not be used with `--report_to wandb`, which would log it")
    from diffusers_ext.training.run.setup import settle_launcher_settings

    try:
        settle_launcher_settings(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def replaced_flag(parser: argparse.ArgumentParser, input_args: Sequence[str]) -> str | None:
    """What to say about the first documented flag that `parser` has not; `None` without one."""
    known = {option for action in parser._actions for option in action.option_strings}
    for argument in input_args:
        flag = argument.partition("=")[0]
        use = DOCUMENTED_FLAGS.get(flag)
        if use is None or any(option.startswith(flag) for option in known):
            continue
        named = use.split()[0].rstrip(",")
        if not named.startswith("--") or named in known:
            return f"`{flag}` of the design documents is not known here; use {use}."
    return None


def file_flags(
    parser: argparse.ArgumentParser,
    input_args: Sequence[str],
    read_block: ReadBlock | None,
    groups: Sequence[type[Settings]],
) -> list[str]:
    """What the file of `--config` holds and the command line does not give, as flags."""
    path = getattr(parser.parse_known_args(input_args)[0], "config", None)
    if path is None:
        return []
    values = read_config(path)
    values = values if read_block is None else read_block(values)
    known = {action.dest for action in parser._actions}
    unknown = sorted(values.keys() - known - setting_names(groups))
    if unknown:
        meant = did_you_mean(unknown, known)
        parser.error(f"`{path}` must hold known arguments, got {unknown}.{meant}")
    return _as_flags(parser, values, input_args)


def early_value(input_args: Sequence[str], name: str) -> Any:
    """What `--<name>`, or else the file of `--config`, holds; for what decides which flags there are."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(f"--{name}", dest="value")
    parser.add_argument("--config")
    given, _ = parser.parse_known_args(list(input_args))
    if given.value is None and given.config is not None:
        return read_config(given.config).get(name)
    return given.value


def read_config(path: str) -> dict[str, Any]:
    """The mapping of a YAML file; raises `ValueError` for a missing or other file."""
    if not Path(path).is_file():
        raise ValueError(f"`config` must be a YAML file, got {path}: no such file.")
    values = read_yaml(path)
    unnamed = [key for key in values if not isinstance(key, str)]
    if unnamed:
        raise ValueError(f"`config` must have names as keys, got {unnamed[0]!r} in {path}.")
    return values


def _as_flags(parser: argparse.ArgumentParser, values: dict[str, Any], input_args: Sequence[str]) -> list[str]:
    """The values that `parser` knows and the command line does not give, as flags."""
    actions = {action.dest: action for action in parser._actions}
    unset = argparse.Namespace(**dict.fromkeys(actions))
    given = vars(parser.parse_known_args(input_args, unset)[0])
    flags: list[str] = []
    for name, value in values.items():
        if name in actions and value is not None and given[name] is None:
            try:
                flags += _as_flag(actions[name], value)
            except ValueError as error:
                parser.error(str(error))
    return flags


def _as_flag(action: argparse.Action, value: Any) -> list[str]:
    flag = action.option_strings[0]
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError(f"`{action.dest}` must be true or false, got {value!r}")
        # Without a flag for False, False is the default.
        return [flag] if value else action.option_strings[1:2]
    if isinstance(value, dict):
        raise ValueError(f"`{action.dest}` must not be a mapping, got {value!r}")
    if action.type in (None, str):
        _check_texts(action, value if isinstance(value, list) else [value])
    if action.nargs is not None:
        return [flag, *map(str, value if isinstance(value, list) else [value])]
    if isinstance(action, argparse._AppendAction):
        return [f"{flag}={item}" for item in (value if isinstance(value, list) else [value])]
    if isinstance(value, list):
        raise ValueError(f"`{action.dest}` must be one value, got {value!r}")
    return [f"{flag}={value}"]


# Flags that take `all` or numbers of layers or timesteps.
_WORDS_OR_NUMBERS = {"cross_attention_layers", "layout_timesteps"}


def _check_texts(action: argparse.Action, values: Sequence[Any]) -> None:
    """Raise where YAML has made something else of a text: `no` is false to it, and `007` is 7."""
    kinds = (str, int) if action.dest in _WORDS_OR_NUMBERS else str
    wrong = [v for v in values if isinstance(v, bool) or not isinstance(v, kinds)]
    if wrong:
        kind = "the truth value" if isinstance(wrong[0], bool) else type(wrong[0]).__name__
        raise ValueError(
            f"`{action.dest}` must be a text, got {kind} {str(wrong[0]).lower()}. YAML reads unquoted "
            f"no, off, yes and on as truth values and digits as numbers: quote it, as in "
            f'{action.dest}: "no"'
        )
