"""Train on the data of PEFT's image generation benchmark, let its script score the result, write a submission.

    git clone https://github.com/huggingface/peft
    python benchmarks/peft_image_generation/train_and_score.py --peft_dir peft/method_comparison/image-gen

What follows `--` goes to the training script: `-- --rank 4 --learning_rate 1e-2`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a file

from benchmarks.peft_image_generation.submission import Training, peak_memory, submission, write_peft_checkpoint
from diffusers_ext.families.lora_files import read_lora
from diffusers_ext.planning.models import published_model
from diffusers_ext.training.nullspace.run import main as train
from diffusers_ext.training.nullspace.run import parse_args

INSTANCE_PROMPT = "a photo of sks cat"
PRESERVED = Path(__file__).parent / "preserved_prompts.txt"


def training_rows(count: int, valid_size: int, test_size: int) -> list[int]:
    """Which rows of the data set the benchmark trains on: those that it neither validates nor tests with."""
    indices = np.arange(count)
    np.random.RandomState(0).shuffle(indices)
    return indices[: count - valid_size - test_size].tolist()


def write_pictures(settings: dict[str, Any], folder: Path) -> int:
    """Write the training pictures of the benchmark with their captions; returns how many.

    Raises:
        ValueError: not one prompt a picture.
    """
    rows = datasets.load_dataset(settings["dataset_id"], split=settings["dataset_split"])
    prompts = settings["instance_prompts"]
    if len(rows) != len(prompts):
        raise ValueError(f"`instance_prompts` must be one a picture, got {len(prompts)} for {len(rows)} pictures.")
    folder.mkdir(parents=True, exist_ok=True)
    chosen = training_rows(len(rows), settings["valid_size"], settings["test_size"])
    for index in chosen:
        picture = rows[index][settings["image_column"]]
        picture = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
        picture.convert("RGB").save(folder / f"{index:03d}.png")
        (folder / f"{index:03d}.txt").write_text(prompts[index] + "\n", encoding="utf-8")
    return len(chosen)


def check_preserved(path: Path, settings: dict[str, Any]) -> None:
    """Raise `ValueError` where a preserved prompt is one that drift is measured on."""
    lines = {" ".join(line.lower().split()) for line in path.read_text(encoding="utf-8").splitlines()}
    known = [prompt for prompt in settings["drift_image_prompts"] if " ".join(prompt.lower().split()) in lines]
    if known:
        raise ValueError(f"`knowledge_prompts` must hold none of the prompts that drift is measured on, got {known}.")


def check_model(settings: dict[str, Any]) -> None:
    """Raise `ValueError` for a base model whose size nobody has told."""
    if published_model(settings["model_id"]) is None:
        raise ValueError(f"`model_id` must be a model that plans know, got {settings['model_id']!r}.")


def train_lora(args: argparse.Namespace, settings: dict[str, Any], work_dir: Path) -> tuple[Path, Training]:
    """Train on the benchmark's pictures by the training script; returns the folder of the LoRA."""
    pictures = work_dir / "pictures"
    write_pictures(settings, pictures)
    flags = {
        "pretrained_model_name_or_path": args.model or settings["model_id"],
        "instance_data_dir": pictures,
        "instance_prompt": INSTANCE_PROMPT,
        "knowledge_prompts": args.knowledge_prompts,
        "resolution": settings["resolution"],
        "max_train_steps": args.max_train_steps,
        "train_batch_size": settings["batch_size"],
        "seed": settings["seed"],
        "output_dir": work_dir / "lora",
    }
    command = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    folder = train(parse_args([*command, *args.training]))
    report = json.loads((folder / "training_report.json").read_text())
    arguments, losses = report["arguments"], [row["loss"] for row in report["history"]]
    # Measured directions are frozen: of these LoRAs B alone trains.
    parts = (".lora_A.", ".lora_B.") if arguments["directions"] in ("plain", "soft") else (".lora_B.",)
    trained = sum(weight.numel() for key, weight in read_lora(folder).items() if any(part in key for part in parts))
    told = Training(
        steps=args.max_train_steps,
        samples=args.max_train_steps * settings["batch_size"],
        seconds=report["seconds"],
        peak_memory=peak_memory(),
        loss=sum(losses[-10:]) / len(losses[-10:]),
        trainable_parameters=trained,
        optimizer={"lr": arguments["learning_rate"], "weight_decay": arguments["adam_weight_decay"]},
        all_parameters=trained + published_model(settings["model_id"]).component("transformer").parameters(),
    )
    return folder, told


def score(peft_dir: Path, checkpoint: Path) -> dict[str, Any]:
    """What the benchmark's `evaluate.py` writes for a checkpoint.

    Raises:
        ValueError: it wrote nothing.
    """
    results = peft_dir / "temporary_results"
    results.mkdir(exist_ok=True)
    before = set(results.glob("*.json"))
    subprocess.run([sys.executable, "evaluate.py", "-v", str(checkpoint.resolve())], cwd=peft_dir, check=True)
    new = set(results.glob("*.json")) - before
    if len(new) != 1:
        raise ValueError(f"`peft_dir` must be where evaluate.py writes one result, got {len(new)} in {results}.")
    return json.loads(new.pop().read_text())


def main(input_args: Sequence[str] | None = None) -> Path:
    """Train, score, write; returns the file to submit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peft_dir", type=Path, required=True, help="method_comparison/image-gen of a PEFT checkout")
    parser.add_argument("--name", default="nullspace/flux2-klein-default", help="of the experiment: <method>/<name>")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/peft_image_generation"))
    parser.add_argument("--model", help="folder of the base model, where it is not to be downloaded")
    parser.add_argument("--knowledge_prompts", type=Path, default=PRESERVED)
    parser.add_argument("--max_train_steps", type=int, default=750)
    parser.add_argument("training", nargs="*", help="arguments of the training script, after --")
    args = parser.parse_args(input_args)
    settings = json.loads((args.peft_dir / "default_training_params.json").read_text())
    check_model(settings)
    check_preserved(args.knowledge_prompts, settings)
    work_dir = args.output_dir / args.name.replace("/", "--")
    lora, told = train_lora(args, settings, work_dir)
    changed = {"max_steps": args.max_train_steps, "optimizer_kwargs": told.optimizer}
    if args.model:
        changed["model_id"] = args.model
    checkpoint = work_dir / "checkpoint"
    write_peft_checkpoint(lora, checkpoint, settings["model_id"], changed)
    result = submission(score(args.peft_dir, checkpoint), told, args.name, checkpoint)
    path = args.output_dir / f"{args.name.replace('/', '--')}.json"
    path.write_text(json.dumps(result, indent=2))
    print(path)
    return path


if __name__ == "__main__":
    main()
