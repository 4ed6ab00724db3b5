"""Small sets of noise pairs and sequences with a target that is easy to learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from diffusers_ext.core.artifacts import fingerprint
from diffusers_ext.golden_noise.networks.golden_noise_model import GoldenNoiseModel
from diffusers_ext.golden_noise.noise_statistics import match_energy
from diffusers_ext.golden_noise.pairs.dataset import source_noise
from diffusers_ext.golden_noise.pairs.shards import PairRecord, PairWriter
from examples.digits.check_model import load_pipeline

PROMPTS = tuple(f"a {color} {digit}" for color in ("red", "blue") for digit in ("two", "six"))
SHAPE = (4, 8, 8)


def easy_change(noise: torch.Tensor, prompt: str) -> torch.Tensor:
    """One step's change: a share of the noise, and a ramp whose sign the prompt decides."""
    ramp = torch.linspace(-1.0, 1.0, noise.shape[-1]).expand(noise.shape)
    return -0.2 * noise + (0.5 if "red" in prompt else -0.5) * ramp


def write_noises(
    folder: Path,
    num_steps: int = 1,
    *,
    prompts: tuple[str, ...] = PROMPTS,
    count: int = 32,
    shape: tuple[int, int, int] = SHAPE,
    facts: dict[str, Any] | None = None,
) -> Path:
    """A native set, `count` samples of `prompts` in turn."""
    deltas, records = [], []
    for index in range(count):
        prompt = prompts[index % len(prompts)]
        noise = state = source_noise(index, shape)
        states = []
        for _ in range(num_steps):
            state = match_energy((state + easy_change(state, prompt))[None], state[None])[0]
            states.append(state - noise)
        deltas.append(torch.stack(states))
        records.append(PairRecord(index, prompt, index, None, None, 0.0, 1.0, 0.0, 0.0))
    writer = PairWriter(folder, shape, num_steps, 1, facts)
    writer.create()
    writer.write_part(0, 0, torch.stack(deltas), records)
    writer.finish_shard(0, 1)
    return folder


def digits_facts() -> dict[str, Any]:
    """Facts of noises that were made with the bundled model."""
    pipeline = load_pipeline()
    models = {name: fingerprint(getattr(pipeline, name)) for name in ("unet", "text_encoder")}
    return {"models": models, "redenoise_steps": 10, "w1": 5.5}


def gain_of(seed: int) -> float:
    """A gain that the noise alone decides, by its mean; negative for a third of the seeds."""
    return source_noise(seed, SHAPE).mean().item() * 8 + 0.2


def judged_pairs(folder: Path, count: int = 64, prompts: tuple[str, ...] = PROMPTS) -> Path:
    """A native set of pairs that a reward has judged, by `gain_of`."""
    records = [
        PairRecord(seed, prompts[seed % len(prompts)], seed, 0.5, 0.5 + gain_of(seed), 0.0, 1.0, 0.0, 0.0)
        for seed in range(count)
    ]
    kept = [record for record in records if record.reward_golden > record.reward_source]
    writer = PairWriter(folder, SHAPE, 1, num_shards=1, facts={})
    writer.create()
    writer.write_part(0, 0, torch.zeros(len(kept), 1, *SHAPE), kept, [r for r in records if r not in kept])
    writer.finish_shard(0, 1)
    return folder


def guarded_network(folder: Path) -> Path:
    """A network for the bundled model that changes noise at random."""
    torch.manual_seed(0)
    network = GoldenNoiseModel(4, 2, 8, text_embed_dim=128, width=16, num_layers=1, num_heads=2)
    torch.nn.init.normal_(network.head.weight, std=0.2)
    network.save_pretrained(folder)
    return folder
