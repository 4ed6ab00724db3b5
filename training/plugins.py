"""Judges that a command line names: imported because the user named them, and for no other reason."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def load_judge(spec: str, name: str = "judge") -> Callable[..., Any]:
    """The judge of `module:attribute`, e.g. `examples.digits.judge:DigitsJudge`.

    The module is looked for in the repository, among installed packages and in the current folder.
    A class is called without arguments first. An object with a method `correct` judges by that,
    any other by being called; both get `(images, prompts)` and give one bool per image.

    Args:
        spec: module and attribute; the attribute may be dotted.
        name: of the command line's argument, for errors.

    Raises:
        ValueError: no such module or attribute, or the object cannot judge.
    """
    module_name, colon, path = spec.partition(":")
    if not (module_name and colon and path):
        raise ValueError(f"`{name}` must be `module:attribute`, got {spec!r}.")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # a script's own folder is there, the user's is not
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, something that it imports is not
        raise ValueError(f"`{name}` must name a module, got {module_name!r}: {error}.") from error
    for attribute in path.split("."):
        if not hasattr(found, attribute):
            raise ValueError(f"`{name}` must name an attribute of {module_name}, got {path!r}.")
        found = getattr(found, attribute)
    judge = found() if isinstance(found, type) else found
    judge = getattr(judge, "correct", judge)
    if not callable(judge):
        raise ValueError(f"`{name}` must be callable or have a method `correct`, got {judge!r}.")
    return judge
