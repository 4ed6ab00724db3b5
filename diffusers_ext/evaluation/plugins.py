"""Judges and rewards that a command line names: imported because the user named them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusers_ext.rewards import CLIPScoreReward, HPSv2Reward, PickScoreReward, Reward

REWARDS: dict[str, Any] = {reward.name: reward for reward in (HPSv2Reward, PickScoreReward, CLIPScoreReward)}


def load_judge(spec: str, name: str = "judge") -> Callable[..., Any]:
    """The judge of `module:attribute`, e.g. `examples.digits.judge:DigitsJudge`; `name` is the flag's.

    The module is looked for in the repository, among installed packages and in the current folder. A class is called
    without arguments first. An object with a method `correct` judges by that, any other by being called; both get
    `(images, prompts)` and give one bool per image.
    """
    judge = _find(spec, name)
    judge = getattr(judge, "correct", judge)
    if not callable(judge):
        raise ValueError(f"`{name}` must be callable or have a method `correct`, got {judge!r}.")
    return judge


def load_reward(
    spec: str,
    name: str = "reward",
    *,
    model: str | None = None,
    version: str | None = None,
    device: Any = "cpu",
    **options: Any,
) -> Reward:
    """A reward by its name or `module:attribute`, e.g. `examples.digits.rewards:DigitsReward`.

    Args:
        spec: `"hpsv2"`, `"pickscore"`, `"clip_score"`, or module and attribute as in `load_judge`: a reward, or a
            class of one that is called without arguments.
        name: of the command line's argument, for errors.
        model, version: of a named reward, its published weights and default when `None`.
        device: where a named reward runs; one of `module:attribute` chooses for itself.
        options: further arguments of a named reward's `from_pretrained`, where they are not `None`: `batch_size`,
            `tokenizer`, `processor`, `local_files_only`, ...
    """
    given = {"version": version, **options}
    given = {key: value for key, value in given.items() if value is not None}
    if spec in REWARDS:
        source = () if model is None else (model,)
        return REWARDS[spec].from_pretrained(*source, device=device, **given)
    if ":" not in spec:
        raise ValueError(f"`{name}` must be one of {list(REWARDS)} or `module:attribute`, got {spec!r}.")
    if given or model is not None:
        unused = sorted(given) if model is None else ["model", *sorted(given)]
        raise ValueError(f"`{name}` must be one of {list(REWARDS)} to take {unused}, got {spec!r}.")
    reward = _find(spec, name)
    missing = [part for part in ("score", "name", "version") if not hasattr(reward, part)]
    if missing or not callable(reward.score):
        raise ValueError(
            f"`{name}` must have a method `score` and attributes `name` and `version`, got "
            f"{reward!r} without {missing}."
        )
    return reward


def _find(spec: str, name: str) -> Any:
    """The object of `module:attribute`; a class is called without arguments."""
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
    return found() if isinstance(found, type) else found
