"""Golden noise on the distilled digits, 2 steps without guidance: targets by a reward, and networks trained on them.

python benchmarks/golden_noise_on_distilled_digits.py --work_dir outputs/golden_noise_distilled
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from benchmarks.golden_noise_on_digits import summary_rows
from benchmarks.machine import table, write_results
from diffusers_ext.evaluation.golden_noise import RedenoisedTarget, Refine, evaluate_golden_noise
from diffusers_ext.evaluation.golden_noise_report import GoldenNoiseReport
from diffusers_ext.golden_noise.networks.base import load_noise_model
from examples.digits.check_model import load_pipeline
from examples.digits.golden_noise import HELD_OUT_PROMPTS
from examples.digits.rewards import DigitsReward, SecondDigitsReward
from examples.digits_distilled.golden_noise import DIRECT, NUM_STEPS, PAIRS, make_pairs, train_network
from examples.digits_distilled.train_model import MODEL_DIR


def train_all(work: Path, names: Sequence[str]) -> dict[str, Path]:
    """Pairs and networks, made unless they are there; returns the networks' folders."""
    folders = {}
    for name in names:
        label = name.replace(",", "").replace(" ", "_")
        data, folders[name] = work / f"pairs_{label}", work / f"network_{label}"
        if name in PAIRS and not (data / "report.json").is_file():
            make_pairs(name, data)
        if not (folders[name] / "training_report.json").is_file():
            train_network(name, folders[name], data=data if name in PAIRS else None)
    return folders


def evaluate(folders: dict[str, Path], pictures: int, work: Path) -> GoldenNoiseReport:
    """Targets and networks against the same standard pictures of held-out prompts and seeds."""
    pipeline, reward = load_pipeline(MODEL_DIR), DigitsReward()
    subjects: dict[str, Refine] = {"guidance target": RedenoisedTarget(pipeline)}
    subjects |= {name: load_noise_model(folder) for name, folder in folders.items()}
    report = evaluate_golden_noise(
        pipeline, HELD_OUT_PROMPTS, refine=subjects, rewards=[reward, SecondDigitsReward()],
        num_images_per_prompt=pictures, seed=1, num_inference_steps=NUM_STEPS, guidance_scale=1.0, batch_size=50,
        sheet_prompts=6,
    )  # fmt: skip
    report.to_csv(work / "pictures.csv")
    report.picture_sheet(work / "sheet.png")
    report.to_json(work / "report.json")
    return report


def main(input_args: list[str] | None = None) -> None:
    """Make the pairs, train, evaluate and write the results; goes on with what is in `--work_dir`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/golden_noise_distilled"))
    parser.add_argument("--pictures", type=int, default=5, help="of each of 100 held-out prompts")
    parser.add_argument("--networks", nargs="+", choices=(*DIRECT, *PAIRS), default=[*DIRECT, *PAIRS])
    parser.add_argument("--name", default="golden_noise_on_distilled_digits")
    args = parser.parse_args(input_args)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    folders = train_all(args.work_dir, args.networks)
    report = evaluate(folders, args.pictures, args.work_dir)
    training = {}
    for name, folder in folders.items():
        facts = json.loads((folder / "training_report.json").read_text())
        training[name] = {key: facts[key] for key in ("parameters", "seconds")}
        training[name] |= {"validation": facts["validation"][-1], "setting": (PAIRS | DIRECT)[name]}
    header = ["noise", f"probability, {NUM_STEPS} steps", "win rate", "second reward", "time / best of 4", "std",
              "lag-1", "diversity", "size, training"]  # fmt: skip
    text = table(header, summary_rows({NUM_STEPS: report}, training))
    results = {name: getattr(report, name) for name in ("settings", "scores", "best_of", "noise", "diversity", "cost")}
    results["settings"] = {**results["settings"], "base": "examples/digits_distilled/model"}
    for facts in results["settings"]["subjects"].values():  # folders of this machine mean nothing to others
        facts.pop("name_or_path", None)
    pairs = {}
    for name in (name for name in PAIRS if name in folders):
        pairs[name] = json.loads((args.work_dir / f"pairs_{name.replace(' ', '_')}" / "report.json").read_text())
    write_results(args.name, {"pairs": pairs, "training": training, "evaluation": results}, text)
    print(text)


if __name__ == "__main__":
    main()
