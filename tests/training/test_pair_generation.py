from __future__ import annotations

import dataclasses

import pytest
import torch

from diffusers_ext.golden_noise.noise_statistics import noise_statistics
from diffusers_ext.golden_noise.pairs.dataset import source_noise
from diffusers_ext.golden_noise.redenoise import encode_prompts, redenoise_sequence
from diffusers_ext.training.golden_noise.rendering import render, square_latent_shape
from diffusers_ext.training.golden_noise.settings import PairSettings
from diffusers_ext.training.pairs import Candidate, PairMaker, list_candidates, split
from tests.golden_noise.golden_pipelines import FAMILIES
from tests.tiny_digits import random_digits_pipeline
from tests.training.stub_rewards import Brightness, Constant

SHAPE = (4, 8, 8)
SETTINGS = PairSettings(
    prompt_file="prompts.txt", output_dir="out", num_steps=2, num_inference_steps=3, guidance_scale=2.0
)
PROMPTS = ["a red seven", "a blue three"]


@pytest.fixture
def pipeline():
    return random_digits_pipeline()


def candidates(count: int = 4) -> list[Candidate]:
    return list_candidates(PROMPTS, count // 2, seed=0)


def noise_of(batch: list[Candidate]) -> torch.Tensor:
    return torch.stack([source_noise(candidate.seed, SHAPE) for candidate in batch])


def test_noises_depend_on_the_seed_the_prompt_and_the_number_alone():
    found = list_candidates(["a", "b"], 2, seed=0)
    assert [(c.index, c.prompt) for c in found] == [(0, "a"), (1, "a"), (2, "b"), (3, "b")]
    seeds = {c.seed for c in found} | {c.sampling_seed for c in found}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert list_candidates(["b"], 2, seed=0)[1].seed == found[3].seed
    assert list_candidates(["b"], 2, seed=1)[1].seed != found[3].seed


def test_kept_and_rejected_pairs_are_told_apart_by_their_rewards(pipeline):
    batch = candidates()
    part = PairMaker(pipeline, SHAPE, SETTINGS, Brightness()).make(batch)
    noise = noise_of(batch)
    text = encode_prompts(pipeline, [c.prompt for c in batch])
    states = redenoise_sequence(pipeline, noise, text, repeats=2)
    golden = noise + (states[:, -1] - noise).half().float()
    scores = [Brightness().score(render(pipeline, x, text, SETTINGS, [0] * 4), []) for x in (noise, golden)]
    wins = (scores[1] > scores[0]).tolist()
    assert len(part.pairs) + len(part.rejected) == 4
    assert {record.index for record in part.pairs} == {i for i, won in enumerate(wins) if won}
    statistics = noise_statistics(golden)
    for record in (*part.pairs, *part.rejected):
        assert record.prompt == batch[record.index].prompt
        assert record.seed == batch[record.index].seed
        assert record.reward_source == pytest.approx(scores[0][record.index].item(), abs=0.05)
        assert record.reward_golden == pytest.approx(scores[1][record.index].item(), abs=0.05)
        for name, values in statistics._asdict().items():
            value = values[record.index].item()
            assert getattr(record, name) == pytest.approx(value, abs=1e-4), name
    kept = torch.tensor([record.index for record in part.pairs], dtype=torch.long)
    assert part.deltas.dtype == torch.float16
    torch.testing.assert_close(part.deltas.float(), (states - noise[:, None])[kept], atol=2e-3, rtol=0)


def test_the_margin_must_be_exceeded(pipeline):
    batch = candidates()
    part = PairMaker(pipeline, SHAPE, SETTINGS, Brightness()).make(batch)
    records = [*part.pairs, *part.rejected]
    gains = sorted(r.reward_golden - r.reward_source for r in records)
    margin = gains[-2]  # the best is above, the second is just not
    strict = dataclasses.replace(SETTINGS, margin=margin)
    part = PairMaker(pipeline, SHAPE, strict, Brightness()).make(batch)
    assert [r.reward_golden - r.reward_source for r in part.pairs] == gains[-1:]
    assert part.deltas.shape == (1, 2, *SHAPE)
    part = PairMaker(pipeline, SHAPE, SETTINGS, Constant()).make(batch)
    assert (len(part.pairs), len(part.rejected), len(part.deltas)) == (0, 4, 0)


def test_a_pair_costs_two_denoiser_calls_a_step_and_its_pictures(pipeline, monkeypatch):
    batches, encoded, rendered = [], [], []
    pipeline.unet.register_forward_hook(lambda module, args, output: batches.append(len(output[0])))
    encode, call = pipeline.encode_prompt, type(pipeline).__call__
    monkeypatch.setattr(pipeline, "encode_prompt", lambda *a, **k: encoded.append(k.get("prompt")) or encode(*a, **k))
    monkeypatch.setattr(
        type(pipeline), "__call__", lambda *a, **k: rendered.append(len(k["latents"])) or call(*a, **k)
    )
    PairMaker(pipeline, SHAPE, SETTINGS, None).make(candidates())
    # Guidance 5.5 doubles the batch, guidance 1 does not.
    assert batches == [8, 4] * SETTINGS.num_steps
    assert encoded == [PROMPTS]
    assert rendered == []
    batches.clear()
    encoded.clear()
    PairMaker(pipeline, SHAPE, SETTINGS, Brightness()).make(candidates())
    assert batches == [8, 4] * SETTINGS.num_steps + [16] * 3
    assert encoded[0] == PROMPTS
    assert [prompts for prompts in encoded[1:] if prompts is not None] == []
    assert rendered == [8]


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family_makes_pairs(family):
    pipeline, pixels = FAMILIES[family].plain(), FAMILIES[family].pixels
    shape = square_latent_shape(pipeline, pixels)
    part = PairMaker(pipeline, shape, SETTINGS, Brightness()).make(candidates(2))
    assert len(part.pairs) + len(part.rejected) == 2
    assert part.deltas.shape == (len(part.pairs), 2, *shape)
    for record in (*part.pairs, *part.rejected):
        assert record.reward_golden != record.reward_source
        assert 0.5 < record.std < 1.5


def test_without_a_filter_all_pairs_stay(pipeline):
    part = PairMaker(pipeline, SHAPE, SETTINGS, None).make(candidates())
    assert [record.index for record in part.pairs] == [0, 1, 2, 3]
    assert part.rejected == []
    assert all(r.reward_source is None and r.reward_golden is None for r in part.pairs)
    assert part.deltas.shape == (4, 2, *SHAPE)


def test_pairs_do_not_depend_on_their_neighbours(pipeline):
    maker = PairMaker(pipeline, SHAPE, SETTINGS, None)
    together = maker.make(candidates()).deltas.float()
    alone = torch.cat([maker.make([one]).deltas for one in candidates()]).float()
    torch.testing.assert_close(alone, together, atol=4e-3, rtol=0)


def test_the_pipeline_is_left_as_it_was(pipeline):
    pipeline.unet.train()
    scheduler, state = pipeline.scheduler, dict(vars(pipeline.scheduler))
    PairMaker(pipeline, SHAPE, SETTINGS, Brightness()).make(candidates(2))
    assert pipeline.unet.training
    assert pipeline.scheduler is scheduler
    assert vars(scheduler).keys() == state.keys()
    assert torch.equal(scheduler.timesteps, state["timesteps"])


def test_shards_and_batches_cover_all_candidates_once():
    numbers = list(range(23))
    shards = [split(numbers, shard_size=10, batch_size=4, shard=shard) for shard in range(3)]
    assert [[len(batch) for batch in shard] for shard in shards] == [[4, 4, 2], [4, 4, 2], [3]]
    assert [n for shard in shards for batch in shard for n in batch] == numbers
