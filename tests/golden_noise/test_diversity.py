from functools import partial

import pytest
import torch

from diffusers_ext.families import find_family
from diffusers_ext.families.predictions import Level, predicted_of, x_0_and_noise
from diffusers_ext.golden_noise import diversity as module
from diffusers_ext.golden_noise.diversity import spread_output
from diffusers_ext.golden_noise.redenoise import TOOL
from tests.golden_noise.golden_pipelines import FAMILIES, PROMPTS, draw, seeded
from tests.in_a_thread import in_a_thread

LEVEL = Level(0.6, 0.8)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow_prediction"])
def test_the_predicted_picture_moves_away_from_the_mean(kind):
    level = Level(0.4, 0.6) if kind == "flow_prediction" else LEVEL
    torch.manual_seed(0)
    x_0, noise, mean = torch.randn(3, 2, 4, 8, 8).unbind(0)
    x_t = level.signal * x_0 + level.sigma * noise
    output = predicted_of(x_0, noise, level, kind)
    moved = x_0_and_noise(spread_output(output, x_t, mean, level, kind, 0.5), x_t, level, kind)[0]
    torch.testing.assert_close(moved, mean + 1.5 * (x_0 - mean), atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module", params=FAMILIES)
def drawn(request):
    """Draws with a golden pipeline without a network."""
    golden = FAMILIES[request.param].golden.from_pipe(FAMILIES[request.param].plain())
    golden.set_progress_bar_config(disable=True)
    return partial(draw, golden, request.param)


def test_a_seed_gives_the_same_picture_in_any_batch(drawn):
    together = drawn(prompt=[PROMPTS[0]] * 2, generator=seeded(0, 1), diversity=1)
    alone = drawn(generator=seeded(0), diversity=1)
    torch.testing.assert_close(together[:1], alone, atol=2e-2, rtol=0)
    assert (together[0] - together[1]).abs().max() > 5e-2


def test_the_dial_is_the_plain_pipeline_at_zero_and_spreads_at_one(drawn):
    plain, zero, one = (drawn(**changes) for changes in ({}, {"diversity": 0}, {"diversity": 1}))
    assert torch.equal(zero, plain)
    assert one.isfinite().all()
    assert (one - plain).abs().max() > 1e-3
    assert torch.equal(drawn(), plain)  # nothing is left behind


def test_what_is_no_number_from_zero_to_one_is_refused():
    drawn = partial(draw, FAMILIES["sd"].golden.from_pipe(FAMILIES["sd"].plain()), "sd")
    for bad in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="`diversity` must be from 0 to 1"):
            drawn(diversity=bad)
    with pytest.raises(TypeError, match="`diversity` must be a number, got a str"):
        drawn(diversity="1")


def test_the_hook_goes_also_after_an_exception(drawn, monkeypatch):
    plain = drawn()

    def fails(*args):
        raise RuntimeError("on the way")

    monkeypatch.setattr(module, "spread_output", fails)
    with pytest.raises(RuntimeError, match="on the way"):
        drawn(diversity=0.5)
    assert torch.equal(drawn(), plain)


def test_another_thread_that_draws_with_the_denoiser_is_left_alone():
    golden = FAMILIES["sd"].golden.from_pipe(FAMILIES["sd"].plain())
    other = FAMILIES["sd"].plain().from_pipe(golden)
    plain = draw(other, "sd")
    with module.spread_pictures(golden, find_family(golden, TOOL), 1.0):
        assert torch.equal(in_a_thread(lambda: draw(other, "sd")), plain)
        assert not torch.equal(draw(other, "sd"), plain)
