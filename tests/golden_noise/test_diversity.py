import math
from functools import partial

import pytest
import torch

from diffusers_ext.families import find_family
from diffusers_ext.families.predictions import Level, predicted_of, predicted_x_0
from diffusers_ext.golden_noise import diversity as module
from diffusers_ext.golden_noise.diversity import moved_prompts, spread_output
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
    moved = predicted_x_0(spread_output(output, x_t, mean, level, kind, 0.5), x_t, level, kind)
    torch.testing.assert_close(moved, mean + 1.5 * (x_0 - mean), atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module", params=FAMILIES)
def drawn(request):
    """Draws with a golden pipeline without a network."""
    golden = FAMILIES[request.param].golden.from_pipe(FAMILIES[request.param].plain())
    golden.set_progress_bar_config(disable=True)
    return partial(draw, golden, request.param)


def test_a_seed_gives_the_same_picture_in_any_batch(drawn):
    together = drawn(prompt=[PROMPTS[0]] * 2, generator=seeded(0, 1), diversity=1, diversity_of="both")
    alone = drawn(generator=seeded(0), diversity=1, diversity_of="both")
    torch.testing.assert_close(together[:1], alone, atol=2e-2, rtol=0)
    assert (together[0] - together[1]).abs().max() > 5e-2


def test_the_dial_is_the_plain_pipeline_at_zero_and_spreads_at_one(drawn):
    plain, zero = drawn(), drawn(diversity=0, diversity_of="both")
    assert torch.equal(zero, plain)
    found = [drawn(diversity=1, diversity_of=way) for way in module.WAYS]
    for one in found:
        assert one.isfinite().all()
        assert (one - plain).abs().max() > 1e-4  # the random FLUX.2 hardly reads its text
    assert not torch.equal(found[0], found[2])
    assert not torch.equal(found[1], found[2])
    assert torch.equal(drawn(), plain)  # nothing is left behind


def test_a_prompt_is_moved_by_its_noise_alone_and_keeps_its_size():
    torch.manual_seed(0)
    noise, text = torch.randn(3, 4, 8, 8), torch.randn(40, 32) * torch.linspace(0.1, 20, 40)[:, None]
    moved = moved_prompts([text, text, text[:20]], noise, 0.5)
    for row, alone in zip(moved, noise, strict=True):
        (same,) = moved_prompts([text[: len(row)]], alone[None], 0.5)
        torch.testing.assert_close(row, same)
    assert not torch.allclose(moved[0], moved[1], atol=0.1)
    sizes = [x.square().mean(1).sqrt() for x in (moved[0], text)]
    assert (sizes[0] / sizes[1] - 1).abs().max() < 0.5
    assert (sizes[0] / sizes[1]).mean() == pytest.approx(1, abs=0.1)
    change = (moved[0] - text / math.sqrt(1.25)) * math.sqrt(1.25) / sizes[1][:, None]
    assert change.std() == pytest.approx(0.5, abs=0.05)
    torch.testing.assert_close(moved_prompts([text], noise[:1] + 1e-5, 0.5)[0], moved[0], atol=1e-2, rtol=1e-3)


def test_what_is_no_number_from_zero_to_one_is_refused():
    drawn = partial(draw, FAMILIES["sd"].golden.from_pipe(FAMILIES["sd"].plain()), "sd")
    for bad in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"`diversity` must be finite and in \[0, 1\]"):
            drawn(diversity=bad)
    with pytest.raises(TypeError, match="`diversity` must be a number, got a str"):
        drawn(diversity="1")
    with pytest.raises(ValueError, match=r"`diversity_of` must be one of \['prediction', 'prompt', 'both'\], got 'x'"):
        drawn(diversity_of="x")


@pytest.mark.parametrize(("way", "part"), [("prediction", "spread_output"), ("both", "moved_prompts")])
def test_the_hooks_go_also_after_an_exception(drawn, monkeypatch, way, part):
    plain = drawn()

    def fails(*args):
        raise RuntimeError("on the way")

    monkeypatch.setattr(module, part, fails)
    with pytest.raises(RuntimeError, match="on the way"):
        drawn(diversity=0.5, diversity_of=way)
    assert torch.equal(drawn(), plain)


@pytest.mark.parametrize("way", module.WAYS)
def test_another_thread_that_draws_with_the_denoiser_is_left_alone(way):
    golden = FAMILIES["sd"].golden.from_pipe(FAMILIES["sd"].plain())
    other = FAMILIES["sd"].plain().from_pipe(golden)
    plain = draw(other, "sd")
    with module.spread_pictures(golden, find_family(golden, TOOL), 1.0, way):
        assert torch.equal(in_a_thread(lambda: draw(other, "sd")), plain)
        assert not torch.equal(draw(other, "sd"), plain)


def test_what_each_way_asks_of_the_denoiser():
    golden = FAMILIES["sd"].golden.from_pipe(FAMILIES["sd"].plain())
    plain, asked = golden.unet.forward, []
    golden.unet.forward = lambda *args, **kwargs: asked.append(kwargs) or plain(*args, **kwargs)
    for way, count in (("prediction", 18), ("prompt", 2), ("both", 18)):
        asked.clear()
        draw(golden, "sd", diversity=1.0, diversity_of=way, num_inference_steps=2)
        texts = [call["encoder_hidden_states"] for call in asked]
        given = texts[-1]  # of the last step, where no prompt is moved
        assert len(asked) == count
        assert [not torch.equal(text, given) for text in texts] == [way != "prediction", *[False] * (count - 1)]
