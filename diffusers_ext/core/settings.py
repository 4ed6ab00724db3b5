"""Settings as dataclasses: each is declared once, with its help, its rule and its other names.

Command lines, YAML files and planners read these declarations; functions take the objects.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from functools import partial
from typing import Any, ClassVar

from diffusers_ext.core.keywords import did_you_mean


@dataclass(frozen=True)
class Rule:
    """What a value must be, in the words of an error, and whether one is it."""

    text: str
    holds: Callable[[Any], bool]


def at_least(least: int) -> Rule:
    """For counts and weights; infinity is none."""
    return Rule(f"at least {least}", lambda value: least <= value < math.inf)


COUNT = at_least(1)
NOT_NEGATIVE = at_least(0)
POSITIVE = Rule("positive", lambda value: 0 < value < math.inf)
FINITE = Rule("a finite number", math.isfinite)
BELOW_ONE = Rule("in [0, 1)", lambda value: 0 <= value < 1)
SHARE = Rule("in [0, 1]", lambda value: 0 <= value <= 1)


@dataclass(frozen=True)
class Declaration:
    """What is known of a setting besides its name, its type and its default.

    Attributes:
        help: what a value does, or which one is taken without it.
        rule: for values that are given.
        choices: all values that there are.
        aliases: other spellings of the flag alone.
        old_names: names that earlier versions had for it: on the command line, in YAML files and in
            what runs have saved.
        flag: its name on the command line where that is not the field's.
        repeated: a list whose items have a flag each, in place of one flag with all items.
        several: one flag with several words, for a type that does not say so.
        with_no: there is a `--no-` form too, as where the default is not false.
    """

    help: str
    rule: Rule | None = None
    choices: tuple[Any, ...] | None = None
    aliases: tuple[str, ...] = ()
    old_names: tuple[str, ...] = ()
    flag: str | None = None
    repeated: bool = False
    several: bool = False
    with_no: bool = False


def setting(default: Any, help: str, **declared: Any) -> Any:
    """A field of `Settings` with its default; `declared` are the other attributes of `Declaration`."""
    return _field(default, Declaration(help, **declared))


def required(help: str, **declared: Any) -> Any:
    """A field of `Settings` that must be given."""
    return _field(MISSING, Declaration(help, **declared))


def as_in(settings_class: type[Settings], name: str, **changed: Any) -> Any:
    """The field of another class, with another `default`, or parts of its `Declaration` changed."""
    found = next(other for other in fields(settings_class) if other.name == name)
    default = changed.pop("default", MISSING)
    return _field(default, replace(declaration(found), **changed))


def _field(default: Any, declared: Declaration) -> Any:
    metadata = {"setting": declared}
    if isinstance(default, list):
        return field(default_factory=partial(list, default), metadata=metadata)
    return field(default=default, metadata=metadata)


def declaration(of: Field) -> Declaration:
    """What was declared of a field."""
    return of.metadata["setting"]


def flag_name(of: Field) -> str:
    """The name of a field on the command line, without dashes."""
    return declaration(of).flag or of.name


@dataclass(kw_only=True)
class Settings:
    """Base of all settings: `title` is that of the group on the command line; values are checked.

    Raises:
        ValueError: a value that breaks its rule, or values that contradict each other.
    """

    title: ClassVar[str | None] = None

    def __init_subclass__(cls, title: str | None = None, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.title = title

    def __post_init__(self) -> None:
        self.settle()
        self.check()

    def settle(self) -> None:
        """Fill in what is not given and follows from other settings."""

    def check(self) -> None:
        """Raise `ValueError` for what is wrong without looking at files and models."""
        for one in fields(self):
            declared, value = declaration(one), getattr(self, one.name)
            if value is None:
                continue
            if declared.rule is not None and not declared.rule.holds(value):
                raise ValueError(f"`{one.name}` must be {declared.rule.text}, got {value}.")
            if declared.choices is not None and value not in declared.choices:
                meant = did_you_mean(str(value), map(str, declared.choices))
                raise ValueError(
                    f"`{one.name}` must be one of {list(declared.choices)}, got {value!r}.{meant}"
                )


def setting_names(classes: Iterable[type[Settings]]) -> set[str]:
    """Names of all settings of some classes, as flags and YAML files have them, old ones too."""
    found = [one for each in classes for one in fields(each)]
    return {name for one in found for name in (flag_name(one), *declaration(one).old_names)}


def named_values(settings: Settings) -> dict[str, Any]:
    """All values by the names that the command line has for them."""
    return {flag_name(one): getattr(settings, one.name) for one in fields(settings)}


def with_new_names(values: dict[str, Any], settings_class: type[Settings]) -> dict[str, Any]:
    """Values of a file with the names that settings have today.

    Raises:
        ValueError: a setting stands there by its old name and its new one.
    """
    values = dict(values)
    for one in fields(settings_class):
        name = flag_name(one)
        for old in declaration(one).old_names:
            if old not in values:
                continue
            if name in values:
                raise ValueError(f"`{name}` must not stand beside its other name `{old}`.")
            values[name] = values.pop(old)
    return values
