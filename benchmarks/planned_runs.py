"""Short runs of all tools on the bundled models, each with the setting that plans it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image

from diffusers_ext.golden_noise.networks.golden_noise_model import GoldenNoiseModel
from diffusers_ext.planning.golden_noise import TEXT
from diffusers_ext.training import guard
from diffusers_ext.training import pairs as generate_npd
from diffusers_ext.training.eraser import run as train_cogvideox_eraser
from diffusers_ext.training.nullspace import run as train_nullspace_dreambooth
from examples.digits.pictures import draw_glyphs, tint
from training import train_npnet

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
DIGITS, MOVING_DIGITS = (EXAMPLES / name / "model" for name in ("digits", "moving_digits"))
_ROWS = 16  # of each kind in a step of the eraser
_KNOWN = ("a red seven", "a blue three", "a green two")
_PAIR_PROMPTS = tuple(f"a {c} {n}" for c in ("red", "blue", "green", "white") for n in (
    "one", "two", "three", "four", "five", "six", "seven", "eight"))  # fmt: skip
_SMALL_NETWORK = {"width": 128, "num_layers": 4}


# Written to the host's memory in these runs, not to a file.
IN_MEMORY = TEXT


class PlannedRun(NamedTuple):
    """What is planned, and how it is run.

    Attributes:
        tool, model, setting: arguments of `plan_run`.
        scripts: by name of the phase that each of them is; they are run in this order.
        kept: folders that the run writes.
    """

    tool: str
    model: Path
    setting: dict[str, Any]
    scripts: dict[str, Callable[[], object]]
    kept: tuple[Path, ...]

    @property
    def written(self) -> int:
        """Bytes of everything below the folders that the run writes."""
        files = (path for folder in self.kept for path in folder.rglob("*"))
        return sum(path.stat().st_size for path in files if path.is_file())


def nullspace_run(folder: Path, *, steps: int, sampling_steps: int, saves: bool = True) -> PlannedRun:
    """A subject of the digits model.

    Args:
        folder: for everything; it must not hold an earlier run.
        steps: of the training.
        sampling_steps: of validation pictures.
        saves: a checkpoint is written at the end.
    """
    pictures, known, output = folder / "pictures", folder / "known.txt", folder / "subject"
    pictures.mkdir(parents=True)
    for index, ink in enumerate(draw_glyphs("triangle", 3, seed=0)):
        Image.fromarray(tint(ink, "white")).save(pictures / f"{index}.png")
    _write_lines(known, _KNOWN)
    shared = {
        "resolution": 32,
        "max_train_steps": steps,
        "train_batch_size": 16,
        "checkpointing_steps": steps if saves else None,
        "num_inference_steps": sampling_steps,
        "num_validation_images": 4,
    }
    line = {
        "pretrained_model_name_or_path": DIGITS,
        "instance_data_dir": pictures,
        "instance_prompt": "a photo of sks",
        "validation_prompt": "a photo of sks",
        "knowledge_prompts": known,
        "output_dir": output,
    }
    setting = {
        "num_knowledge_prompts": len(_KNOWN),
        "words_per_prompt": 3,
        "num_instance_images": 3,
        "num_validation_prompts": 1,
    }
    script = _script(train_nullspace_dreambooth, {**line, **shared})
    return PlannedRun("nullspace", DIGITS, {**setting, **shared}, {"training": script}, (output,))


def golden_noise_run(folder: Path, *, steps: int, saves: bool = True, **_: int) -> PlannedRun:
    """Pairs of the digits model without a filter, and a small network; see `nullspace_run`."""
    prompts, pairs, output = folder / "prompts.txt", folder / "pairs", folder / "network"
    folder.mkdir(parents=True, exist_ok=True)
    _write_lines(prompts, _PAIR_PROMPTS)
    base = {"pretrained_model_name_or_path": DIGITS}
    making = {"batch_size": 32, "noises_per_prompt": 4}
    shared = {"max_train_steps": steps, "train_batch_size": 64, "checkpointing_steps": steps if saves else None}
    make = {**base, **making, "prompt_file": prompts, "output_dir": pairs, "no_filter": True}
    train = {**base, **shared, **_SMALL_NETWORK, "model": "golden_noise_model"}
    train |= {"dataset_dir": pairs, "output_dir": output, "learning_rate": 1e-3, "use_ema": True}
    setting = {"reward": None, "num_prompts": len(_PAIR_PROMPTS), "use_ema": True}
    return PlannedRun(
        "golden-noise",
        DIGITS,
        {**setting, **making, **shared, "structure": _SMALL_NETWORK},
        {"re-denoising": _script(generate_npd, make), "training": _script(train_npnet, train)},
        (pairs, output),
    )


def guard_run(folder: Path, *, steps: int, sampling_steps: int, saves: bool = True) -> PlannedRun:
    """A guard for a network that changes nothing yet, judged by the digits' reward; see `nullspace_run`."""
    prompts, gains, output = folder / "prompts.txt", folder / "gains", folder / "guarded"
    folder.mkdir(parents=True, exist_ok=True)
    _write_lines(prompts, _PAIR_PROMPTS)
    torch.manual_seed(0)
    network = GoldenNoiseModel(4, 2, 8, text_embed_dim=128, **_SMALL_NETWORK)
    torch.nn.init.normal_(network.head.weight, std=0.2)
    network.save_pretrained(folder / "network")
    shared = {
        "max_train_steps": steps,
        "checkpointing_steps": steps if saves else None,
        "num_inference_steps": sampling_steps,
        "guidance_scale": 1.5,
        "noises_per_prompt": 4,
        "batch_size": 16,
        "reward": "examples.digits.rewards:DigitsReward",
    }
    line = {
        "pretrained_model_name_or_path": DIGITS,
        "noise_model": folder / "network",
        "prompt_file": prompts,
        "dataset_dir": gains,
        "output_dir": output,
    }
    setting = {"num_prompts": len(_PAIR_PROMPTS), "structure": _SMALL_NETWORK}
    script = _script(guard, {**line, **shared})
    return PlannedRun("guard", DIGITS, {**setting, **shared}, {"training": script}, (gains, output))


def eraser_run(folder: Path, *, steps: int, sampling_steps: int, saves: bool = True) -> PlannedRun:
    """An eraser for the moving-digits model; see `nullspace_run`."""
    prompts, preserved = folder / "sevens.txt", folder / "digits.txt"
    output, samples = folder / "eraser", folder / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    _write_lines(prompts, ("a red seven moving right", "a blue seven moving up"))
    _write_lines(preserved, ("three", "two"))
    shared = {
        "max_train_steps": steps,
        "checkpointing_steps": steps if saves else None,
        "num_target_trajectories": 8,
        "num_preserved_trajectories": 8,
        "num_inference_steps": sampling_steps,
        "points_per_trajectory": sampling_steps,
        "sampling_batch_size": 8,
    }
    line = {
        "pretrained_model_name_or_path": MOVING_DIGITS,
        "target_concept": "seven",
        "anchor_concept": "digit",
        "prompts_file": prompts,
        "preserved_concepts_file": preserved,
        "eraser_rank": 32,
        "learning_rate": 1e-3,
        "train_batch_size": _ROWS,
        "trajectories_dir": samples if saves else None,  # in memory without
        "output_dir": output,
    }
    setting = {"rank": 32, "target_rows": _ROWS, "preserved_rows": _ROWS, "num_prompts": 8}
    setting |= {"mixed_precision": "no", "gradient_checkpointing": False}
    script = _script(train_cogvideox_eraser, {**line, **shared})
    scripts = {"training": script}
    return PlannedRun("eraser", MOVING_DIGITS, {**setting, **shared}, scripts, (output, samples))


RUNS = (nullspace_run, golden_noise_run, guard_run, eraser_run)


def _script(module: Any, arguments: dict[str, Any]) -> Callable[[], object]:
    line = []
    for name, value in arguments.items():
        if value is not None:
            line += [f"--{name}"] if value is True else [f"--{name}", str(value)]

    def run() -> object:
        # Accelerate keeps its state in globals, which a second run in one process would inherit.
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        return module.main(module.parse_args(line))

    return run


def _write_lines(path: Path, lines: tuple[str, ...]) -> None:
    path.write_text("\n".join([*lines, ""]), encoding="utf-8")
