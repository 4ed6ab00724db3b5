"""Every stream of random numbers starts from a seed of its own, the same on any machine."""

import torch

from diffusers_ext.core.seeds import step_generator, step_seed, stream_generator, stream_seed


def test_seeds_of_streams_are_those_of_earlier_versions():
    assert stream_seed(0, "target", 2) == 2619545446451684245
    drawn = torch.randn(4, generator=stream_generator(0, "target", 2))
    expected = torch.Generator().manual_seed(stream_seed(0, "target", 2))
    assert torch.equal(drawn, torch.randn(4, generator=expected))


def test_seeds_differ_by_seed_stream_index_and_process():
    seeds = {
        step_seed(seed, stream, index, process)
        for seed in (0, 1, 2**32 - 1)
        for stream in (1, 2)
        for index in range(50)
        for process in range(3)
    }
    assert len(seeds) == 3 * 2 * 50 * 3
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_the_generator_of_a_step_does_not_depend_on_what_ran_before():
    expected = torch.randn(4, generator=step_generator(3, 5))
    torch.randn(10, generator=step_generator(3, 4))
    assert torch.equal(torch.randn(4, generator=step_generator(3, 5)), expected)
    for other in ((3, 6), (4, 5), (3, 5, 1)):
        assert not torch.equal(torch.randn(4, generator=step_generator(*other)), expected)
