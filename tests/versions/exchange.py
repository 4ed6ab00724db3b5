"""Artifacts of every kind, written under one set of installed versions and read under another.

`python -m tests.versions.exchange write FOLDER`, then `read FOLDER` by the other environment's Python; ends with 1
where something is refused or differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import DiffusionPipeline
from diffusers import __version__ as diffusers_version

from diffusers_ext import FeatureStatistics, edit_concept, load_noise_model
from diffusers_ext.core.artifacts import fingerprint
from diffusers_ext.eraser.files import load_eraser
from diffusers_ext.eraser.linear import convert_eraser_to_lora
from diffusers_ext.families.base_source import load_base
from diffusers_ext.families.lora_files import read_lora
from diffusers_ext.golden_noise.networks.golden_noise_model import GoldenNoiseModel
from diffusers_ext.golden_noise.networks.guard import NoiseGuard
from diffusers_ext.golden_noise.pipelines import GoldenNoisePipeline
from diffusers_ext.nullspace.collect import collect_statistics
from diffusers_ext.nullspace.edit import read_edit
from diffusers_ext.nullspace.npy_tree import export_layout, load_layout
from diffusers_ext.nullspace.pipeline import NullSpaceDreamBoothPipeline
from tests.campaign.artifacts import KINDS
from tests.eraser.saved_erasers import run, saved_eraser
from tests.tiny_cogvideox import tiny_transformer
from tests.tiny_digits import random_digits_pipeline

DIGITS = Path(__file__).parents[2] / "examples" / "digits" / "model"
PROMPT = "a photo of the red digit seven"
SIZES = {"in_channels": 4, "text_embed_dim": 12, "width": 16, "num_layers": 1, "num_heads": 2}
Pair = tuple[Callable[[Path], Any], Callable[[Path], Any]]


def digits() -> DiffusionPipeline:
    """The bundled model."""
    return load_base(DIGITS, dtype=torch.float32)


def _statistics(folder: Path) -> None:
    collect_statistics(digits(), [PROMPT], show_progress=False).save_pretrained(folder)


def _read_statistics(folder: Path) -> Any:
    statistics = FeatureStatistics.from_pretrained(folder)
    pipeline = digits()
    statistics.check_pipeline(pipeline)  # by the fingerprints of denoiser and text encoder
    again = collect_statistics(pipeline, [PROMPT], show_progress=False)
    for name, moment in statistics.moments.items():
        torch.testing.assert_close(again.moments[name].mean, moment.mean, rtol=1e-5, atol=1e-7)
    return {name: moment.mean for name, moment in statistics.moments.items()}


def _tree(folder: Path) -> None:
    export_layout(collect_statistics(digits(), [PROMPT], show_progress=False), folder, show_progress=False)


def _read_tree(folder: Path) -> Any:
    loaded = load_layout(folder, denoiser=digits().unet, show_progress=False)
    return {name: moment.mean for name, moment in loaded.moments.items()}


def _edit(folder: Path) -> None:
    edit_concept(digits(), {"seven": "one"}, ["a red two"]).save(folder)


def _read_edit(folder: Path) -> Any:
    pipeline = digits()
    pipeline.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors")
    edits, kept, _ = read_edit(folder)
    return read_lora(folder), [str(edit) for edit in edits], kept


def _network_with_guard(folder: Path) -> None:
    torch.manual_seed(0)
    network = GoldenNoiseModel(patch_size=2, sample_size=8, **SIZES)
    network.set_guard(NoiseGuard(**SIZES, gain_scale=0.5))
    network.save_pretrained(folder)


def _read_network_with_guard(folder: Path) -> Any:
    network = load_noise_model(folder)
    return network.state_dict(), network.guard.state_dict()


def _read_eraser(folder: Path) -> Any:
    transformer = tiny_transformer()
    name = load_eraser(transformer, folder)
    config = transformer.peft_config[name]
    weights = {key: value for key, value in transformer.state_dict().items() if "eraser" in key}
    assert not torch.equal(run(transformer), run(tiny_transformer()))
    return weights, config.r, config.concept, config.anchor_concept


def _linear_eraser(folder: Path) -> None:
    saved_eraser(folder / "eraser", kind="linear")
    convert_eraser_to_lora(folder / "eraser", folder / "lora")


def _weights(pipeline: DiffusionPipeline) -> Any:
    return {
        name: [fingerprint(part), *(p.detach() for p in part.parameters())]
        for name, part in sorted(pipeline.components.items())
        if isinstance(part, torch.nn.Module)
    }


def _read_pipeline(kind: type) -> Callable[[Path], Any]:
    def read(folder: Path) -> Any:
        pipeline = kind.from_pretrained(folder)
        words = pipeline.tokenizer([PROMPT, "a sks five"], padding="max_length").input_ids
        return _weights(pipeline), words

    return read


def _base(folder: Path) -> None:
    from examples.arguments import save_in_half_precision

    save_in_half_precision(random_digits_pipeline(), folder)


_CAMPAIGN = ("LoRA", "LoRA of another program", "statistics", "compressed statistics", "NPNet", "GoldenNoiseModel",
             "NoiseSequenceTransformer", "NoiseSequenceRNN", "noise pairs", "noise pairs as npz", "noise pairs as pt",
             "pipeline with a network", "pipeline with statistics", "teacher samples", "checkpoint")  # fmt: skip
EXCHANGED: dict[str, Pair] = {
    **{name: (KINDS[name].make, KINDS[name].load) for name in _CAMPAIGN},
    "statistics of the bundled model": (_statistics, _read_statistics),
    "statistics as npy files": (_tree, _read_tree),
    "knowledge edit": (_edit, _read_edit),
    "network with a guard": (_network_with_guard, _read_network_with_guard),
    "eraser": (saved_eraser, _read_eraser),
    "eraser in the legacy format": (lambda folder: saved_eraser(folder, format="legacy"), _read_eraser),
    "linear eraser as a LoRA": (_linear_eraser, lambda folder: read_lora(folder / "lora")),
    "golden-noise pipeline": (KINDS["pipeline with a network"].make, _read_pipeline(GoldenNoisePipeline)),
    "null-space pipeline": (KINDS["pipeline with statistics"].make, _read_pipeline(NullSpaceDreamBoothPipeline)),
    "base model of the examples": (_base, _read_pipeline(DiffusionPipeline)),
}


def digest(value: Any) -> str:
    """Of nested containers, tensors to the bit."""
    found = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, torch.Tensor):
            found.update(f"{part.dtype} {tuple(part.shape)}".encode())
            found.update(part.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(part, dict):
            for key in sorted(part, key=str):
                found.update(str(key).encode())
                add(part[key])
        elif isinstance(part, (list, tuple)):
            for item in part:
                add(item)
        else:
            found.update(repr(part).encode())

    add(value)
    return found.hexdigest()[:16]


def write(folder: Path) -> None:
    """Write one of each kind, and digests of what it is loaded as here."""
    digests = {}
    for name, (make, read) in EXCHANGED.items():
        place = folder / name.replace(" ", "_")
        place.mkdir(parents=True)
        make(place)
        digests[name] = digest(read(place))
    facts = {"versions": f"transformers {transformers.__version__}, diffusers {diffusers_version}", "digests": digests}
    (folder / "exchange.json").write_text(json.dumps(facts, indent=2) + "\n")


def read(folder: Path) -> list[str]:
    """Load one of each kind; what is wrong, in words."""
    digests = json.loads((folder / "exchange.json").read_text())["digests"]
    wrong = [f"{name}: not written" for name in EXCHANGED.keys() - digests.keys()]
    for name, expected in digests.items():
        try:
            found = digest(EXCHANGED[name][1](folder / name.replace(" ", "_")))
        except (OSError, ValueError, TypeError, KeyError, RuntimeError, AttributeError, AssertionError) as error:
            wrong.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:400]}")
            continue
        if found != expected:
            wrong.append(f"{name}: loaded as something else")
    return wrong


def main() -> int:
    """Write or read a folder; print what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["write", "read"])
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable()
    torch.set_num_threads(1)
    if args.what == "write":
        write(args.folder)
        return 0
    wrong = read(args.folder)
    print("\n".join([*wrong, f"{len(EXCHANGED) - len(wrong)} of {len(EXCHANGED)} kinds exchanged"]))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
