"""How a script starts and ends: errors in one line, its folder, what to do with the result, the upload."""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from accelerate.logging import get_logger
from huggingface_hub import HfApi
from huggingface_hub.errors import LocalTokenNotFoundError

from diffusers_ext.core.artifacts import folder_lock
from diffusers_ext.core.result_folder import check_no_result, remove_result, staged_output
from diffusers_ext.core.settings import ModelSettings, RunSettings, Settings, TrainingSettings, flag_name, named_values
from diffusers_ext.eraser.recipe import EraserSettings
from diffusers_ext.hub.card import Card
from diffusers_ext.hub.connection import HTTP_ERROR, answered_with, one_try_to_connect
from diffusers_ext.hub.kinds import find_licence, named_licence, public_name
from diffusers_ext.hub.push import check_card, make_repository, push_folder
from diffusers_ext.training.golden_noise.settings import NoiseSettings, PairSettings
from diffusers_ext.training.run.checkpoint_files import list_checkpoints, remove_checkpoint
from diffusers_ext.training.run.launcher import process_rank
from diffusers_ext.training.run.settings import TRACEBACK_FLAG, WRONG_USAGE, error_line, user_errors


def network_words(settings: NoiseSettings, report: Mapping[str, Any]) -> str:
    """Of a trained golden-noise network; the report is as in `training_report.json`."""
    data = report["data"]
    samples = counted(data["training_samples"], "sample")
    words = f"Trained {report['network']} on {samples} in {steps_taken(settings, report)}."
    last = report["validation"][-1] if report["validation"] else {}
    figures = [
        f"{name.removeprefix('validation_')} {value:.4g}"
        for name, value in last.items()
        if name.startswith("validation_relative") or name.startswith("validation_cosine")
    ]
    words += (
        f" On held-out prompts: {', '.join(figures)} (relative squared error: 0 is perfect, 1 is the "
        "noise as it is; cosine with the true change: 1 is perfect)."
        if figures
        else " Nothing was held out to measure it on."
    )
    folder = Path(settings.output_dir)
    base = settings.pretrained_model_name_or_path or "BASE_MODEL"
    compare = script_line(
        "evaluate_golden_noise",
        pretrained_model_name_or_path=base,
        noise_model=folder,
        prompt_file="HELD_OUT_PROMPTS.txt",
        reward="pickscore",
        output_dir=folder / "evaluation",
    )
    return (
        f"{words} Wrote {folder}. Load it: diffusers_ext.load_noise_model({str(folder)!r}). Compare with "
        f"plain noise: {compare}"
    )


def eraser_words(settings: EraserSettings, report: Mapping[str, Any]) -> str:
    """Of a trained eraser; the report is as in `training_report.json`."""
    counts = {name: len(prompts) for name, prompts in report["prompts"].items()}
    folder = Path(settings.output_dir)
    compare = script_line(
        "evaluate_eraser",
        pretrained_model_name_or_path=settings.pretrained_model_name_or_path,
        eraser=folder,
        evaluation_prompts="PROMPTS.csv",
        judge="JUDGE",
        output_dir=folder / "evaluation",
    )
    return (
        f"Trained to erase {settings.target_concept!r} on {counted(counts['target'], 'prompt')} that ask for "
        f"it and to keep {counts['preserved']} others, in {steps_taken(settings, report)}; whether it does is not "
        f"measured yet. Wrote {folder}. Load it: diffusers_ext.load_eraser(pipe, {str(folder)!r}). "
        f"Compare with the model as it was: {compare}"
    )


def pairs_words(settings: PairSettings) -> str:
    """How to load made noise pairs and what to do with them."""
    train = script_line(
        "train_npnet",
        pretrained_model_name_or_path=settings.pretrained_model_name_or_path,
        dataset_dir=settings.output_dir,
        output_dir="NETWORK",
    )
    return f"Load them: diffusers_ext.PairDataset({settings.output_dir!r}). Train a network: {train}"


def steps_taken(settings: TrainingSettings, report: Mapping[str, Any]) -> str:
    """Steps, time and losses of a training."""
    words = f"{counted(settings.max_train_steps, 'step')} ({lasted(report['seconds'])}"
    losses = [row["loss"] for row in report["history"] if "loss" in row]
    return f"{words}, loss {losses[0]:.4g} to {losses[-1]:.4g})" if losses else f"{words})"


def counted(number: int, noun: str) -> str:
    """`1 step`, `2 steps`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def lasted(seconds: float) -> str:
    """Seconds, or minutes from two on."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def script_line(script: str, **flags: Any) -> str:
    """The command line of a training script."""
    given = " ".join(f"--{name} {shlex.quote(str(value))}" for name, value in flags.items())
    return f"python training/{script}.py {given}"


__all__ = ["check_output_dir", "clear_output_dir", "one_run_a_folder", "staged_output"]

logger = get_logger(__name__)
ReturnType = TypeVar("ReturnType")
# What runs draw on the way; besides checkpoints all that they write before the end.
ON_THE_WAY = ("validation/step-*",)
# By these a result that lists no files is known.
REPORTS = ("training_report.json", "report.json")
# Of trainings that listed no files.
_UNLISTED = (
    "training_report.json", "pytorch_lora_weights.safetensors", "adapter_config.json",
    "adapter_model.safetensors", "config.json", "diffusion_pytorch_model.safetensors",
    "statistics/config.json", "statistics/model.safetensors", "pipeline/**/*",
)  # fmt: skip


def one_run_a_folder(main: Callable[[Any], ReturnType]) -> Callable[[Any], ReturnType]:
    """Let a script's `main` hold `--output_dir` while it runs; of several processes the first one does."""

    @functools.wraps(main)
    def held(settings: Any) -> ReturnType:
        if process_rank() != 0:
            return main(settings)
        with folder_lock(settings.output_dir):
            return main(settings)

    return held


def check_output_dir(settings: ModelSettings, names: Sequence[str] = REPORTS) -> None:
    """Raise `ValueError` where `--output_dir` holds a result and nobody asked to replace it.

    `names` are files that tell of a result that lists no files.
    """
    if not hasattr(settings, "resume_from_checkpoint") and Path(settings.output_dir, REPORTS[0]).is_file():
        raise ValueError(
            f"`output_dir` must not hold a trained model, got {settings.output_dir} with {REPORTS[0]}: a "
            "report would take its place. Choose another folder."
        )
    resumed = getattr(settings, "resume_from_checkpoint", None) is not None
    if resumed or settings.overwrite_output_dir:
        return
    hint = ""
    if hasattr(settings, "resume_from_checkpoint") and list_checkpoints(settings.output_dir):
        hint = " Pass `--resume_from_checkpoint latest` to train it further."
    check_no_result(settings.output_dir, names, hint=hint)


def clear_output_dir(settings: RunSettings) -> None:
    """With `--overwrite_output_dir`, remove what an earlier training left: result, pictures, checkpoints."""
    if not settings.overwrite_output_dir or settings.resume_from_checkpoint is not None:
        return
    folder = Path(settings.output_dir)
    unlisted = _UNLISTED if (folder / "training_report.json").is_file() else ()
    remove_result(folder, [*unlisted, *ON_THE_WAY])
    for checkpoint in list_checkpoints(folder):
        remove_checkpoint(checkpoint)


INTERRUPTED = 130
# Longer than launchers take to end the others when the first process has ended.
_PATIENCE = 3.0


def run_script(
    parse_args: Callable[[], Any],
    main: Callable[[Any], Any],
    settings_class: type[Settings] | None = None,
    failed: int = WRONG_USAGE,
) -> None:
    """Parse and run; `--traceback` shows where an error came from.

    Of several processes that fail alike the first one speaks: the others wait, and the launcher ends them. What fails
    in another one alone is told by that one. Errors of the rules of `settings_class`, by default what `parse_args` is
    annotated with, name flags. After an error of the user's the exit code is `failed`, after an interruption 130; a
    command line that cannot be read has 2.
    """
    settings, said = argparse.Namespace(), io.StringIO()
    rank = process_rank()
    try:
        with contextlib.redirect_stderr(said) if rank else contextlib.nullcontext():
            settings = parse_args()
        with one_try_to_connect():
            main(settings)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except (SystemExit, *user_errors()) as error:
        if isinstance(error, SystemExit) and not error.code:
            raise
        if rank:
            time.sleep(_PATIENCE)
        if isinstance(error, SystemExit):  # of the parser, after its line
            sys.stderr.write(said.getvalue())
            raise
        if TRACEBACK_FLAG in sys.argv[1:]:
            traceback.print_exc()
        declared = settings_class or get_type_hints(parse_args).get("return")
        names = {name: name for name in vars(settings)}
        if is_dataclass(declared):
            names |= {one.name: flag_name(one) for one in fields(declared)}
        flags = {name: f"--{flag}" for name, flag in names.items()}
        place = f"[process {rank}] " if rank else ""
        print(f"{place}error: {error_line(error, settings, flags)}", file=sys.stderr)
        raise SystemExit(failed) from None


def card_arguments(settings: RunSettings) -> dict[str, Any]:
    """What every card needs and the command line says; `ValueError` where no licence is known."""
    base = settings.hub_base_model or settings.pretrained_model_name_or_path
    try:
        given = named_licence(settings.hub_license, settings.hub_license_name, settings.hub_license_link)
        licence = find_licence(base, given, token=settings.hub_token)
    except ValueError as error:
        raise ValueError(f"{error} The flag is `--hub_license`.") from error
    return {"base_model": base, "license": licence, "token": settings.hub_token}


def check_login(settings: RunSettings) -> None:
    """Raise `ValueError` where nobody is logged in: before the run, not after it."""
    try:
        HfApi(token=settings.hub_token).whoami()
    except LocalTokenNotFoundError as error:
        raise ValueError(
            "`hub_token` must be given with `push_to_hub` where nobody is logged in, got None. Run `hf auth login`."
        ) from error
    except HTTP_ERROR as error:
        if answered_with(error) != 401:
            raise
        raise ValueError(
            "`hub_token` must be a token of the Hub, got one that it refuses. Make a new one there."
        ) from error


def repository_name(settings: RunSettings) -> str:
    """The repository of `--hub_model_id`, or one with the name of the output folder."""
    return settings.hub_model_id or Path(settings.output_dir).resolve().name


def upload_arguments(settings: RunSettings) -> dict[str, Any]:
    """What the command line says about the upload itself."""
    return {"private": settings.hub_private_repo or None, "token": settings.hub_token}


def reported_arguments(settings: Settings) -> dict[str, Any]:
    """What a report keeps of the command line: all but the token."""
    return {name: value for name, value in named_values(settings).items() if name != "hub_token"}


def prepare_upload(settings: RunSettings, card: Callable[..., Card]) -> None:
    """Make the repository and let the Hub read a card before a run: at its end it would be too late.

    The card has what is known by now. Raises `ValueError` where the Hub refuses it.
    """
    check_card(card("user/name"))
    make_repository(repository_name(settings), **upload_arguments(settings))


def push_output(
    settings: RunSettings, card: Callable[..., Card], ignored: Sequence[str] = (), at_root: str | None = None
) -> str:
    """Upload the output folder but for files of `ignored` patterns; returns the address of the commit.

    `at_root` is a folder in it whose files come to the root of the repository.
    """
    commit = push_folder(
        settings.output_dir,
        repository_name(settings),
        card,
        commit_message="Upload results of the training scripts",
        ignore_patterns=ignored,
        at_root=at_root,
        **upload_arguments(settings),
    )
    logger.info(f"Uploaded to {commit}")
    return commit


def card_record(settings: RunSettings, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What a report keeps for a later upload by `push_artifact`: facts of the card, JSON-able."""
    base = settings.hub_base_model or public_name(settings.pretrained_model_name_or_path)
    # One that the Hub does not list is more than a word, and is to be given again.
    licence = None if settings.hub_license_name else settings.hub_license
    return {"base_model": base, "license": licence, **facts}


def widget_of(settings: RunSettings, prompts: Sequence[str], files: Sequence[Path]) -> list[tuple[str, str]]:
    """Prompts with their pictures or clips below the output folder, as a card names them."""
    return [(p, path.relative_to(settings.output_dir).as_posix()) for p, path in zip(prompts, files)]


def left_here(settings: RunSettings, *inputs: str | None) -> list[str]:
    """Patterns for what an upload of the output folder leaves out: checkpoints, logs and the folders of `inputs`."""
    root = Path(settings.output_dir).resolve()
    folders = [Path(folder).resolve() for folder in inputs if folder is not None]
    folders.append(Path(settings.output_dir, settings.logging_dir).resolve())
    below = [f.relative_to(root).as_posix() for f in folders if f.is_relative_to(root)]
    # The names of TensorBoard's files hold that of the machine.
    return ["checkpoint-*", ".partial-*", "*tfevents*", *(f"{folder}/*" for folder in below)]
