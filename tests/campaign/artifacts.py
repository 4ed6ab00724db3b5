"""One small artifact of every kind that users give each other or a run writes, and how it is loaded.

What loading gives is nested containers of tensors and plain values, so that two results can be compared to the bit.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from diffusers_ext import FeatureStatistics, export_lora, load_eraser, load_noise_model, open_pairs
from diffusers_ext.core.second_moment import SecondMoment
from diffusers_ext.eraser.teacher.store import open_teacher_samples
from diffusers_ext.families.lora_files import read_lora_file
from diffusers_ext.golden_noise.pipelines import GoldenNoisePipeline
from diffusers_ext.nullspace.collect import collect_statistics
from diffusers_ext.nullspace.pipeline import NullSpaceDreamBoothPipeline
from diffusers_ext.nullspace.prompts import read_prompts_file
from diffusers_ext.training.run.checkpoints import Checkpoints
from diffusers_ext.training.run.settings import read_config
from tests.eraser.saved_erasers import saved_eraser
from tests.eraser.teacher_runs import collect, tiny_teacher
from tests.golden_noise.golden_pipelines import random_network
from tests.golden_noise.pair_sets import write_set
from tests.tiny_cogvideox import tiny_transformer
from tests.tiny_digits import random_digits_pipeline


@dataclass(frozen=True)
class Kind:
    """One kind of artifact.

    Attributes:
        make: writes it into an empty folder.
        load: reads it as a user would.
        files: names of the files to alter; patterns of `Path.glob`.
        sealed: a checksum covers values, so that an altered one must be refused. Of others an altered value is another
            artifact, and only what it breaks can be found.
    """

    make: Callable[[Path], Any]
    load: Callable[[Path], Any]
    files: tuple[str, ...]
    sealed: bool = True


LINEAR = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"


def _lora() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    names = ["unet.a.attn2.to_k", "unet.b.attn2.to_k"]
    parts = {"lora_A.weight": (2, 6), "lora_B.weight": (4, 2)}
    return {f"{name}.{part}": torch.randn(shape) for name in names for part, shape in parts.items()}


def _foreign_lora(folder: Path) -> None:
    settings = {"unet.r": 2, "unet.lora_alpha": 2, "unet.rank_pattern": {"nothing": 4}}
    save_file(_lora(), folder / "l.safetensors", {"lora_adapter_metadata": json.dumps(settings)})


def _statistics() -> FeatureStatistics:
    features = torch.randn(10, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moment = SecondMoment(6, compute_dtype=torch.float64).update(features)
    facts = {"models": {}, "prompts": ["a red seven"], "settings": {"seed": 0}}
    return FeatureStatistics({"text": moment}, {LINEAR: "text"}, facts)


def _statistics_parts(statistics: FeatureStatistics) -> Any:
    means = {key: (moment.mean, moment.count) for key, moment in statistics.moments.items()}
    return means, statistics.sources, statistics.facts


def _eraser_parts(folder: Path) -> Any:
    transformer = tiny_transformer()
    name = load_eraser(transformer, folder)
    config = transformer.peft_config[name].to_dict()
    state = transformer.state_dict()
    found = {key: value for key, value in state.items() if "eraser" in key}
    # The name of the base model may be mended by hand: no checksum covers it.
    config.pop("base_model_name_or_path")
    return found, {key: repr(value) for key, value in config.items()}


def _network(name: str) -> Kind:
    def make(folder: Path) -> None:
        random_network(GoldenNoisePipeline.from_pipe(random_digits_pipeline()), name).save_pretrained(folder)

    files = ("config.json", "*.safetensors")
    return Kind(make, lambda folder: _network_parts(load_noise_model(folder)), files)


def _network_parts(network: torch.nn.Module) -> Any:
    config = {k: v for k, v in network.config.items() if not k.startswith("_")}
    return network.state_dict(), json.loads(json.dumps(config))


def _pipeline_with_network(folder: Path) -> None:
    golden = GoldenNoisePipeline.from_pipe(random_digits_pipeline())
    GoldenNoisePipeline.from_pipe(golden, noise_model=random_network(golden)).save_pretrained(folder)


def _pipeline_with_statistics(folder: Path) -> None:
    pipeline = random_digits_pipeline()
    statistics = collect_statistics(pipeline, ["a red seven"], expand_sub_phrases=False, show_progress=False)
    NullSpaceDreamBoothPipeline.from_pipe(pipeline, statistics=statistics).save_pretrained(folder)


def _items(folder: Path) -> Any:
    pairs = open_pairs(folder)
    return [pairs[index] for index in range(len(pairs))], pairs.facts


def _npz_pairs(folder: Path) -> None:
    for index in range(2):
        noises = np.random.default_rng(index).standard_normal((2, 1, 4, 8, 8)).astype(np.float32)
        np.savez(folder / f"{index}_7.npz", *noises)
    rows = [
        {"index": index, "seed": 7, "caption": f"a {index}", "original_score_list": [0.1],
         "optimized_score_list": [0.2]} for index in range(2)
    ]  # fmt: skip
    (folder / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _pt_pairs(folder: Path) -> None:
    names = ("prompt", "source_noise_file", "target_noise_file")
    with open(folder / "metadata.csv", "w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(names)
        for index in range(2):
            files = [f"{index}_{name}.pt" for name in ("source", "target")]
            for file in files:
                torch.save(torch.randn(1, 4, 8, 8), folder / file)
            writer.writerow([f"a red {index}", *files])


def _teacher(folder: Path) -> None:
    pipeline, velocity, texts = tiny_teacher()
    collect(velocity, pipeline, texts, directory=folder, facts={"prompts": ["a"]})


def _teacher_rows(folder: Path) -> Any:
    samples = open_teacher_samples(folder)
    rows = [[part[i] for i in range(len(part))] for part in samples.parts.values()]
    return rows, samples.head_weights


def _run(folder: Path) -> tuple[Checkpoints, Any]:
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    checkpoints = Checkpoints(accelerator, folder, {"seed": 0}, every=1)
    model = torch.nn.Linear(3, 2)
    return checkpoints, accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))


def _checkpoint(folder: Path) -> None:
    checkpoints, (model, optimizer) = _run(folder)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    checkpoints.save(1)


def _resumed(folder: Path) -> Any:
    checkpoints, (model, optimizer) = _run(folder)
    step = checkpoints.resume("latest")
    return step, model.state_dict(), optimizer.state_dict()["state"], torch.randn(3)


def _prompts(name: str) -> Kind:
    content = {
        "p.txt": "a red fox\na blue owl\n",
        "p.csv": "id;prompt\n1;a red fox\n2;a blue owl\n",
        "p.tsv": "id\tprompt\n1\ta red fox\n",
        "p.json": '["a red fox", "a blue owl"]\n',
        "p.jsonl": '{"prompt": "a red fox"}\n{"prompt": "a blue owl"}\n',
    }[name]
    return Kind(
        lambda folder: (folder / name).write_text(content),
        lambda folder: list(read_prompts_file(folder / name)),
        (name,),
        sealed=False,
    )


def _yaml(folder: Path) -> None:
    (folder / "c.yaml").write_text("learning_rate: 0.1\nprompts: [a red fox, a blue owl]\nseed: 3\n")


STATISTICS_FILES = ("config.json", "model.safetensors")
KINDS: dict[str, Kind] = {
    "LoRA": Kind(
        lambda folder: export_lora(_lora(), output_path=folder / "l.safetensors"),
        lambda folder: read_lora_file(folder / "l.safetensors"),
        ("l.safetensors",),
    ),
    "LoRA of another program": Kind(
        _foreign_lora, lambda f: read_lora_file(f / "l.safetensors"), ("l.safetensors",), sealed=False
    ),
    "statistics": Kind(
        lambda folder: _statistics().save_pretrained(folder),
        lambda folder: _statistics_parts(FeatureStatistics.from_pretrained(folder)),
        STATISTICS_FILES,
    ),
    "compressed statistics": Kind(
        lambda folder: _statistics().compress(0.9).save_pretrained(folder),
        lambda folder: _statistics_parts(FeatureStatistics.from_pretrained(folder)),
        STATISTICS_FILES,
    ),
    "eraser": Kind(saved_eraser, _eraser_parts, ("adapter_config.json", "*.safetensors")),
    "eraser in the legacy format": Kind(
        lambda folder: saved_eraser(folder, format="legacy"),
        _eraser_parts,
        ("eraser_config.json", "eraser_weights.pt"),
        sealed=False,
    ),
    "NPNet": _network("npnet"),
    "GoldenNoiseModel": _network("model"),
    "NoiseSequenceTransformer": _network("transformer"),
    "NoiseSequenceRNN": _network("rnn"),
    "noise pairs": Kind(
        write_set, _items, ("config.json", "deltas/00000.*", "pairs/00001.*", "rejected/00000.*", "shards/00000.*")
    ),
    "noise pairs as npz": Kind(_npz_pairs, _items, ("0_7.npz", "scores.jsonl"), sealed=False),
    "noise pairs as pt": Kind(_pt_pairs, _items, ("1_target.pt", "metadata.csv"), sealed=False),
    "pipeline with a network": Kind(
        _pipeline_with_network,
        lambda f: _network_parts(GoldenNoisePipeline.from_pretrained(f, dtype=torch.float32).noise_model),
        ("noise_model/config.json", "noise_model/*.safetensors"),
    ),
    "pipeline with statistics": Kind(
        _pipeline_with_statistics,
        lambda f: _statistics_parts(
            NullSpaceDreamBoothPipeline.from_pretrained(f, dtype=torch.float32).statistics
        ),
        tuple(f"statistics/{name}" for name in STATISTICS_FILES),
    ),
    "teacher samples": Kind(
        _teacher, _teacher_rows, ("config.json", "target/00000.safetensors", "preserved/00002.safetensors")
    ),
    "checkpoint": Kind(
        _checkpoint,
        _resumed,
        ("checkpoint-1/run.json", "checkpoint-1/*.safetensors", "checkpoint-1/optimizer_0.json"),
    ),
    **{f"prompts as {name[2:]}": _prompts(name) for name in ("p.txt", "p.csv", "p.tsv", "p.json", "p.jsonl")},
    "settings in YAML": Kind(_yaml, lambda folder: read_config(folder / "c.yaml"), ("c.yaml",), sealed=False),
}  # fmt: skip
