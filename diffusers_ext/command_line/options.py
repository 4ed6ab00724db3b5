"""Options that several commands share: the base model, how pictures are drawn, what looks at them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers_ext.core.settings import PRECISIONS

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

    from diffusers_ext.evaluation.report_files import SavedReport
    from diffusers_ext.evaluation.settings import PictureSettings
    from diffusers_ext.rewards import Reward


PROGRAM = "diffusers-ext"
DONE, FAILED, WRONG_USAGE, DOES_NOT_FIT, INTERRUPTED = 0, 1, 2, 3, 130  # exit codes


@dataclass(frozen=True)
class Outcome:
    """What a command found or did: facts for `--json`, JSON-able but for paths, and a text for people."""

    facts: dict[str, Any]
    text: str
    code: int = DONE


@dataclass(frozen=True)
class Command:
    """One sub-command.

    Attributes:
        name: words after the program's name, e.g. `"convert lora"`.
        summary: one line for the list of commands.
        examples: whole command lines without the program's name, at least one.
        run: does it. Imports what it needs when it is called, so that help comes fast.
        output: name of the argument that says where a result goes; `None` where nothing is written.
        result_names: files that tell of a finished result in a folder; empty where `output` is a file.
        over_file: gives the flags that the file of `--config` stands for; `None` where there is none.
    """

    name: str
    summary: str
    description: str
    examples: tuple[str, ...]
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], Outcome]
    output: str | None = None
    result_names: tuple[str, ...] = ()
    over_file: Callable[[Sequence[str]], list[str]] | None = None


@contextmanager
def result_place(args: argparse.Namespace) -> Iterator[None]:
    """Hold the folder, or check the file, that `args.command` writes; refuse to replace a finished result unasked."""
    command: Command = args.command
    if command.output is None:
        yield
        return
    from diffusers_ext.core.artifacts import folder_lock
    from diffusers_ext.core.result_folder import check_no_file, check_no_result

    place = getattr(args, command.output)
    if not command.result_names:
        check_no_file(place, args.overwrite_output_dir, flag=command.output)
        yield
        return
    with folder_lock(place, command.output):
        if not args.overwrite_output_dir:
            check_no_result(place, command.result_names, flag=command.output)
        yield


def report_outcome(report: SavedReport, folder: Path, table: str) -> Outcome:
    """The figures of an evaluation, without one row for every picture, and its files in `folder`."""
    facts = {name: getattr(report, name) for name in report.saved if name != "rows"}
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name[0] != ".")
    files = sorted(path.relative_to(folder).as_posix() for path in paths)
    return Outcome({"output_dir": folder, "files": files, **facts}, f"{table}\nWrote {folder}")


def add_base_model_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Which base model, and how it runs."""
    group = parser.add_argument_group("base model")
    group.add_argument(
        "--pretrained_model_name_or_path",
        required=required,
        help="folder or Hub name of a pipeline, or .safetensors file of Stable Diffusion or SDXL",
    )
    group.add_argument(
        "--single_file_config",
        help="folder or Hub name of a diffusers model whose configs and tokenizer a .safetensors file is "
        "read with; what diffusers infers without it",
    )
    group.add_argument("--revision", help="of the base model on the Hub")
    group.add_argument("--variant", help="of the weight files, e.g. fp16")
    group.add_argument("--mixed_precision", choices=list(PRECISIONS), help="of the weights; no without it")
    group.add_argument("--device", help="e.g. cuda:1; a GPU if there is one without it")
    group.add_argument("--seed", type=int, default=0, help="of everything random")


def add_hub_arguments(parser: argparse.ArgumentParser, what: str) -> None:
    """Whether and how the result, `what` in words, is uploaded."""
    group = parser.add_argument_group("hub")
    group.add_argument("--push_to_hub", action="store_true", help="upload the result with a card")
    group.add_argument("--hub_model_id", help="repository; the output folder's name without it")
    group.add_argument("--hub_token", help="taken from the login without it")
    group.add_argument("--hub_private_repo", action="store_true", default=None, help="if the repository is new")
    group.add_argument("--base_model", help="Hub name of the base model, where it is a folder")
    group.add_argument("--license", help=f"of the {what}; the base model's own without it")


def check_hub_arguments(args: argparse.Namespace) -> None:
    """What would stop the upload, before the work."""
    from diffusers_ext.hub.kinds import find_licence

    if args.push_to_hub:
        find_licence(args.base_model or args.pretrained_model_name_or_path, args.license, token=args.hub_token)


def hub_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Of an upload to `--hub_model_id`, as methods `push_to_hub` take them."""
    return {
        "repo_id": args.hub_model_id or Path(args.output_dir).resolve().name,
        "private": args.hub_private_repo,
        "token": args.hub_token,
        "base_model": args.base_model,
        "license": args.license,
    }


def check_values(args: argparse.Namespace, names: Sequence[str], rule: str, holds: Callable[[Any], bool]) -> None:
    """Raise `ValueError` where a given argument breaks a rule; `None` is not given."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not holds(value):
            raise ValueError(f"`{name}` must be {rule}, got {value}.")


def check_drawing_arguments(args: argparse.Namespace, counts: Sequence[str]) -> None:
    """Raise `ValueError` for a wrong output folder, seed, or number of something."""
    check_values(args, counts, "at least 1", lambda value: value >= 1)
    check_values(args, ["output_dir"], "a folder", lambda value: not Path(value).is_file())
    check_values(args, ["seed"], "from 0 to 2^32 - 1", lambda value: 0 <= value < 2**32)


def picture_arguments(settings: PictureSettings) -> dict[str, Any]:
    """The sampling group as arguments of an evaluation."""
    names = (
        "num_inference_steps", "num_images_per_prompt", "batch_size", "height", "width",
        "guidance_scale", "sheet_prompts", "seed",
    )  # fmt: skip
    # Not the empty string: SDXL reads zeros in place of a prompt that is not given.
    negative = settings.negative_prompt or None
    return {"negative_prompt": negative, **{name: getattr(settings, name) for name in names}}


def chosen_device(args: argparse.Namespace) -> torch.device:
    """`--device`, or the best one there is."""
    import torch

    if args.device is not None:
        try:
            return torch.device(args.device)
        except RuntimeError as error:
            raise ValueError(f"`device` must be one of torch's, got {args.device!r}.") from error
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check_pipeline_class(args: argparse.Namespace, tool: str | None = None) -> dict[str, Any]:
    """The base model's `model_index.json`, read before any weights; of a family that a `tool` works with."""
    from diffusers_ext.families import families_of
    from diffusers_ext.families.base_source import read_base_config, refuse_single_file

    source = args.pretrained_model_name_or_path
    families = families_of(tool) if tool else []
    also = [family.image_pipeline for family in families if tool == "eraser" and family.image_pipeline]
    classes = [*also, *(family.pipelines[0] for family in families)]
    if classes:
        refuse_single_file(source, f"a {' or '.join(classes)}")
    components = read_base_config(source, revision=args.revision, single_file_config=args.single_file_config)
    found = components["_class_name"]
    if classes and found not in classes:
        raise ValueError(
            f"`pretrained_model_name_or_path` must be a {' or '.join(classes)}, got a {found} in {source}."
        )
    return components


def load_base_pipeline(args: argparse.Namespace, tool: str | None = None, *, place: bool = True) -> DiffusionPipeline:
    """The base model, frozen, in evaluation mode, without a safety checker; `place` it on the device."""
    from diffusers_ext.training.run.base_model import load_frozen
    from diffusers_ext.training.run.setup import WEIGHT_DTYPES

    device = chosen_device(args)
    check_pipeline_class(args, tool)
    pipeline = load_frozen(args, WEIGHT_DTYPES[args.mixed_precision or "no"])
    return pipeline.to(device) if place else pipeline


def load_features(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """`features` of `--dino`, else of `--clip`; `scorer`, how well pictures fit prompts, of `--clip`."""
    from diffusers_ext.evaluation.features import CLIPFeatures, DINOv2Features

    found: dict[str, Any] = {}
    if args.clip is not None:
        found["features"] = CLIPFeatures.from_pretrained(args.clip, device=device)
        found["scorer"] = found["features"].text_similarity
    if args.dino is not None:
        found["features"] = DINOv2Features.from_pretrained(args.dino, device=device)
    return found


def load_rewards(args: argparse.Namespace, device: torch.device) -> list[Reward]:
    """The rewards of `--reward`, in their order."""
    from diffusers_ext.evaluation.judges import load_reward

    models = _by_reward(args.reward, args.reward_model, "reward_model")
    versions = _by_reward(args.reward, args.reward_version, "reward_version")
    return [
        load_reward(spec, model=models.get(spec), version=versions.get(spec), device=device) for spec in args.reward
    ]


def _by_reward(rewards: list[str], entries: list[str], name: str) -> dict[str, str]:
    """`{reward: value}` of a repeated `REWARD=value`; a single reward needs no `REWARD=`."""
    found: dict[str, str] = {}
    for entry in entries:
        reward, equals, value = entry.partition("=")
        if reward not in rewards and len(rewards) == 1:
            reward, equals, value = rewards[0], "=", entry
        if not (equals and value) or reward not in rewards or reward in found:
            raise ValueError(f"`{name}` must be REWARD=value, once for each of {rewards}, got {entry!r}.")
        found[reward] = value
    return found
