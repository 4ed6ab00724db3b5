from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

from diffusers_ext.eraser.teacher.store import TeacherSamples, TensorRows, to_storage


def part(runs, points=2, **columns):
    return TensorRows(
        [{"t": torch.arange(points) + 10 * run, "x_t": torch.full((points, 3), float(run))} for run in range(runs)]
    )


def test_rows_of_the_shorter_part_come_again():
    samples = TeacherSamples({"target": part(1), "preserved": part(3)})
    assert len(samples) == 6
    assert [int(samples[i]["target"]["t"]) for i in range(6)] == [0, 1] * 3
    assert [int(samples[i]["preserved"]["t"]) for i in range(6)] == [0, 1, 10, 11, 20, 21]
    with pytest.raises(IndexError, match="from 0 to 5, got 6"):
        samples[6]


def test_a_loader_makes_batches_of_items():
    batch = next(iter(DataLoader(TeacherSamples({"target": part(2)}), batch_size=4)))
    assert batch.keys() == {"target"}
    assert batch["target"]["x_t"].shape == (4, 3)
    assert batch["target"]["t"].dtype == torch.int64


@pytest.mark.parametrize("parts", [{}, {"target": []}, {"other": part(1)}])
def test_parts_must_have_rows_and_known_names(parts):
    with pytest.raises(ValueError, match="`parts` must have rows, of"):
        TeacherSamples(parts)


def test_storage_casts_numbers_and_keeps_indices():
    rows = {"x_t": torch.tensor([[1.0], [7e4]]), "prompt": torch.tensor([3, 4])}
    stored = to_storage(rows, torch.bfloat16)
    assert stored["x_t"].dtype == torch.bfloat16
    assert stored["prompt"].dtype == torch.int64
    with pytest.raises(ValueError, match="`x_t` must be finite, got NaN or infinity for prompt 4"):
        to_storage(rows, torch.float16)
