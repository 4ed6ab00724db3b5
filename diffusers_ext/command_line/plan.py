"""`diffusers-ext plan`: memory, disk and time of a run, before anything is downloaded or run."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from diffusers_ext.command_line.options import DOES_NOT_FIT, DONE, Command, Outcome


class Flag(NamedTuple):
    """How one setting is written on the command line.

    Attributes:
        explanation: for the help.
        parse: makes a value of a word; `bool` takes none.
        several: any number of words.
        has_no: there is a `--no-` form too.
    """

    explanation: str
    parse: Any = int
    several: bool = False
    has_no: bool = False


def add_setting(group: argparse._ArgumentGroup, setting: Mapping[str, Flag]) -> None:
    """Add the flags; what is not given is not in the parsed arguments."""
    for name, flag in setting.items():
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": flag.explanation}
        if flag.has_no:
            options["action"] = argparse.BooleanOptionalAction
        elif flag.parse is bool:
            options["action"] = "store_true"
        else:
            options["type"] = flag.parse
        if flag.several:
            options["nargs"] = "+"
        group.add_argument(f"--{name}", **options)


def given_setting(args: argparse.Namespace, setting: Mapping[str, Flag]) -> dict[str, Any]:
    """What was given."""
    found = {name: getattr(args, name) for name in setting if name in args}
    if "layers" in found:
        found["layers"] = _layers(found["layers"])
    return found


def _layers(words: Sequence[str]) -> str | list[int]:
    if list(words) == ["all"]:
        return "all"
    try:
        return [int(word) for word in words]
    except ValueError as error:
        raise ValueError(f"`layers` must be 'all' or indices, got {list(words)}.") from error


def _optional(word: str) -> str | None:
    return None if word == "none" else word


def _mapping(word: str) -> dict[str, Any]:
    try:
        value = json.loads(word)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {word!r}")
    return value


_TRAINING = {
    "max_train_steps": Flag("optimizer steps"),
    "gradient_accumulation_steps": Flag("batches of a step"),
    "mixed_precision": Flag("no, fp16 or bf16", str),
    "validation_steps": Flag("steps between two validations; only at the end without it"),
    "checkpointing_steps": Flag("steps between two checkpoints; none are written without it"),
    "checkpoints_total_limit": Flag("how many are kept; all without it"),
}
_CHECKPOINTING = "blocks are computed again for their gradients"

ERASER = {
    "rank": Flag("width of the bottleneck"),
    "num_frames": Flag("of a clip; the model's own without it"),
    "height": Flag("of a clip; the model's own without it"),
    "width": Flag("of a clip; the model's own without it"),
    "target_rows": Flag("clips of the concept at once"),
    "preserved_rows": Flag("clips of what is kept at once"),
    "rows_in_turn": Flag("target rows, then preserved rows: less memory", bool),
    "gradient_checkpointing": Flag(f"{_CHECKPOINTING}; on without it", bool, has_no=True),
    **_TRAINING,
    "mixed_precision": Flag("no, fp16 or bf16; bf16 without it", str),
    "localization": Flag("masks are made and used", bool),
    "latents_source": Flag("trajectory, video or noise", str),
    "num_target_trajectories": Flag("clips of the concept that the teacher samples"),
    "num_preserved_trajectories": Flag("clips of what is kept that it samples"),
    "points_per_trajectory": Flag("states kept of each"),
    "num_inference_steps": Flag("of a clip"),
    "sampling_batch_size": Flag("clips that the teacher samples at once"),
    "trajectories_dtype": Flag("fp32 or fp16, of the kept states", str),
    "num_prompts": Flag("encoded in all"),
    "text_batch_size": Flag("prompts encoded at once"),
    "validation": Flag("clips are decoded in the course of training", bool),
}
NULLSPACE = {
    "resolution": Flag("pixels of a side; the model's own without it"),
    "rank": Flag("of the LoRA"),
    "features": Flag("q k v out attn1.q ... ff.in ff.out", str, several=True),
    "layers": Flag("all, or indices", str, several=True),
    "directions": Flag("generalized, null, soft or plain", str),
    "full_finetune": Flag("whole weights in place of a LoRA", bool),
    "train_batch_size": Flag("pictures of a batch"),
    "gradient_checkpointing": Flag(_CHECKPOINTING, bool),
    **_TRAINING,
    "num_knowledge_prompts": Flag("preserved prompts"),
    "words_per_prompt": Flag("of each, for the phrases with one word left out"),
    "no_sub_phrases": Flag("leave these out", bool),
    "statistics_batch_size": Flag("prompts of a denoising run"),
    "num_inference_steps": Flag("of pictures and denoising runs"),
    "guidance_scale": Flag("of them", float),
    "num_instance_images": Flag("pictures of the subject"),
    "random_flip": Flag("both ways round", bool),
    "with_prior_preservation": Flag("pictures of the class are trained on, too", bool),
    "num_class_images": Flag("how many"),
    "num_validation_prompts": Flag("drawn in the course of training"),
    "num_validation_images": Flag("of each"),
}
GOLDEN_NOISE = {
    "output_size": Flag("pixels of a side; the model's own without it"),
    "num_prompts": Flag("different prompts"),
    "noises_per_prompt": Flag("pairs tried for each"),
    "num_steps": Flag("golden noises of each; more than 1 makes sequences"),
    "w1": Flag("guidance of the step down", float),
    "w2": Flag("guidance of the step up", float),
    "batch_size": Flag("pairs made at once"),
    "shard_size": Flag("pairs tried for one file"),
    "reward": Flag("hpsv2, pickscore, clip_score, or none to keep all pairs", _optional),
    "num_inference_steps": Flag("of the pictures that are scored"),
    "guidance_scale": Flag("of them", float),
    "kept_share": Flag("of the pairs that the filter keeps", float),
    "network": Flag("golden_noise_model, npnet, transformer or rnn", str),
    "structure": Flag("fields of the network's config, as a JSON object", _mapping),
    "train_batch_size": Flag("pairs of a batch; what suits the network without it"),
    "gradient_checkpointing": Flag(_CHECKPOINTING, bool),
    **_TRAINING,
    "max_train_steps": Flag("optimizer steps; those of the script's epochs without it"),
    "use_ema": Flag("averaged weights are kept and saved", bool),
    "text_batch_size": Flag("prompts encoded at once for the training"),
    "text_cache_dtype": Flag("fp16 or fp32, of the kept embeddings", str),
    "validation_split": Flag("share of the prompts that is held out", float),
    "num_validation_pairs": Flag("measured at most, of each side of the split"),
}


_DESCRIPTION = (
    "Nothing is downloaded: the run is gone through over tensors that have shapes and no data. What is "
    "not given is as the training script has it, unless its help below says what is taken."
)


def _adder(setting: Mapping[str, Flag]) -> Callable[[argparse.ArgumentParser], None]:
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--pretrained_model_name_or_path", required=True, help="a published name or a folder"
        )
        parser.add_argument(
            "--gpu",
            help='e.g. "RTX 4090"; "here" times the steps on this machine, at random weights',
        )
        parser.add_argument("--memory_gib", type=float, help="in place of the GPU's own")
        add_setting(parser.add_argument_group("setting"), setting)

    return add_arguments


def _runner(tool: str, setting: Mapping[str, Flag]) -> Callable[[argparse.Namespace], Outcome]:
    def run(args: argparse.Namespace) -> Outcome:
        from diffusers_ext.planning import plan_run

        model, given = args.pretrained_model_name_or_path, given_setting(args, setting)
        plan = plan_run(tool, model, gpu=args.gpu, memory_gib=args.memory_gib, **given)
        code = DOES_NOT_FIT if plan.fits is False else DONE
        return Outcome(plan.to_dict(), plan.table(), code)

    return run


def _command(tool: str, summary: str, setting: Mapping[str, Flag], *examples: str) -> Command:
    description = f"{summary[0].upper()}{summary[1:]}. {_DESCRIPTION}"
    add_arguments, run = _adder(setting), _runner(tool, setting)
    return Command(f"plan {tool}", summary, description, examples, add_arguments, run)


PLAN_ERASER = _command(
    "eraser",
    "memory, disk and time of training an eraser",
    ERASER,
    "plan eraser --pretrained_model_name_or_path CogVideoX-5b --memory_gib 24",
    'plan eraser --pretrained_model_name_or_path CogVideoX-2b --gpu "RTX 4090" --json',
)
PLAN_NULLSPACE = _command(
    "nullspace",
    "memory, disk and time of null-space DreamBooth",
    NULLSPACE,
    'plan nullspace --pretrained_model_name_or_path SD1.5 --gpu "RTX 3060" --mixed_precision fp16',
)
PLAN_GOLDEN_NOISE = _command(
    "golden-noise",
    "memory, disk and time of training a golden-noise network",
    GOLDEN_NOISE,
    'plan golden-noise --pretrained_model_name_or_path SDXL --gpu "A100 80GB" --num_prompts 10000 '
    "--mixed_precision fp16",
)
