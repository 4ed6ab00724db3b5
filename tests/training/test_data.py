from __future__ import annotations

from itertools import islice

import pytest

from diffusers_ext.training.run.loop import StepBatchSampler


def take(count: int, length: int = 7, batch_size: int = 2, seed: int = 0, **arguments):
    return list(islice(StepBatchSampler(length, batch_size, seed, **arguments), count))


def flat(batches: list[list[int]]) -> list[int]:
    return [index for batch in batches for index in batch]


def test_every_epoch_is_a_permutation_of_its_own():
    indices = flat(take(21))
    epochs = [indices[start : start + 7] for start in range(0, 42, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_a_batch_depends_on_seed_and_step_alone():
    batches = take(12)
    for start in (0, 1, 5, 11):
        assert take(12 - start, start=start) == batches[start:]
    sampler = StepBatchSampler(7, 2, 0)
    assert [sampler.batch(step) for step in (9, 2, 9)] == [batches[9], batches[2], batches[9]]
    assert take(12, seed=1) != batches


def test_accumulated_batches_are_one_large_batch():
    halves, whole = take(8, batch_size=2), take(4, batch_size=4)
    assert [halves[2 * step] + halves[2 * step + 1] for step in range(4)] == whole


@pytest.mark.parametrize("num_processes", [2, 3])
def test_processes_take_disjoint_slices_of_one_global_batch(num_processes):
    parts = [take(7, length=12, process_index=index, num_processes=num_processes) for index in range(num_processes)]
    assert [flat(rows) for rows in zip(*parts)] == take(7, length=12, batch_size=2 * num_processes)
    seen = flat([part[step] for step in range(12 // (2 * num_processes)) for part in parts])
    assert sorted(seen) == list(range(12))


def test_a_set_smaller_than_a_batch_is_repeated():
    batches = take(3, length=2, batch_size=5)
    assert [len(batch) for batch in batches] == [5, 5, 5]
    assert sorted(flat(batches)) == [0] * 7 + [1] * 8 or sorted(flat(batches)) == [0] * 8 + [1] * 7
    assert take(2, length=1, batch_size=2) == [[0, 0], [0, 0]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1, 0), "`length` must be at least 1, got 0. Is the data set empty"),
        ((3, 0, 0), "`batch_size` must be at least 1, got 0"),
    ],
)
def test_empty_sets_and_batches_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        StepBatchSampler(*arguments)
