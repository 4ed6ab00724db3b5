"""A small set of noise sequences in the native format."""

from __future__ import annotations

from pathlib import Path

import torch

from diffusers_ext.golden_noise.pairs.shards import PairRecord, PairWriter

SHAPE, STEPS = (4, 8, 8), 2
# Words that a careless reader of tables takes for missing values, dates or numbers.
PROMPTS = ("None", "NA", "null", "2020-01-01", 'a red, "big" seven', "7")


def record(index: int, prompt: str | None = None) -> PairRecord:
    prompt = PROMPTS[index % len(PROMPTS)] if prompt is None else prompt
    return PairRecord(index, prompt, 2**62 + index, 0.1, 0.1 + index, 0.0, 1.0, -0.1, 0.01)


def deltas_of(indices: list[int]) -> torch.Tensor:
    torch.manual_seed(indices[0] if indices else 0)
    return torch.randn(len(indices), STEPS, *SHAPE)


def write_set(folder: Path, finish: tuple[int, ...] = (0, 1)) -> PairWriter:
    """Two shards of two parts: items 0, 1, 2 and 5 in the first, 6 and 7 in the second."""
    writer = PairWriter(folder, SHAPE, STEPS, num_shards=2, facts={"w1": 5.5})
    writer.create()
    writer.write_part(0, 0, deltas_of([0, 1, 2]), [record(0), record(1), record(2)], [record(3)])
    writer.write_part(0, 1, deltas_of([5]), [record(5)], [record(4)])
    writer.write_part(1, 0, deltas_of([6, 7]), [record(6), record(7)])
    for shard in finish:
        writer.finish_shard(shard, 2 - shard)
    return writer
