from __future__ import annotations

import pytest
import torch

from diffusers_ext.core.artifacts import fingerprint, same_fingerprint
from diffusers_ext.evaluation.features import PixelFeatures
from diffusers_ext.evaluation.golden_noise import NetworkRefiner, RedenoisedTarget, name_subjects
from diffusers_ext.evaluation.paired_comparison import mean_pairwise_distance
from diffusers_ext.evaluation.rendering import Sampling, draw, image_seed, shots_of, to_images
from diffusers_ext.golden_noise.noise_statistics import match_energy, match_spectrum, noise_statistics
from diffusers_ext.golden_noise.redenoise import encode_prompts, redenoise_text
from tests.evaluation.golden_subjects import PROMPTS, Redness, evaluate, moved, small_network, unmoved
from tests.golden_noise.golden_pipelines import golden_pipeline
from tests.training.stub_rewards import Brightness, BrokenForNine, Constant

SAMPLING = Sampling(2, 3.0)
REWARDS = [Brightness(), Redness()]


def test_rows_are_the_scores_and_the_noise_of_every_picture(pipeline):
    report = evaluate(pipeline, rewards=REWARDS, num_images_per_prompt=2, seed=5, batch_size=4)
    shots = shots_of(PROMPTS, 2, seed=5)
    assert [(row["prompt"], row["index"], row["seed"]) for row in report.rows] == shots
    images = to_images(draw(pipeline, shots, SAMPLING))
    for reward, label in zip(REWARDS, ("brightness 1", "redness 3"), strict=True):
        found = [row[f"standard/{label}"] for row in report.rows]
        assert found == pytest.approx(reward.score(images, PROMPTS).tolist(), abs=1e-3)
    noise = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(s.seed)) for s in shots])
    golden = moved(noise, None)
    for name, values in noise_statistics(golden)._asdict().items():
        found = [row[f"golden/noise_{name}"] for row in report.rows]
        assert found == pytest.approx(values.tolist(), rel=1e-5)
    change = (golden - noise).flatten(1).norm(dim=1) / noise.flatten(1).norm(dim=1)
    assert report.noise["golden"]["change"] == pytest.approx(change.mean().item(), rel=1e-5)
    standard = [row["standard/noise_std"] for row in report.rows]
    assert report.noise["standard"]["std"] == pytest.approx(sum(standard) / 6)


def test_summaries_belong_to_the_rows(pipeline):
    report = evaluate(pipeline, num_images_per_prompt=2)
    (found,) = report.scores["golden"].values()
    pairs = [(row["standard/brightness 1"], row["golden/brightness 1"]) for row in report.rows]
    assert found["pairs"] == 6
    assert found["difference"] == pytest.approx(sum(b - a for a, b in pairs) / 6)
    assert found["win_rate"] == sum(b > a for a, b in pairs) / 6
    assert report.settings["resampled"] == "pairs"
    shots = shots_of(PROMPTS, 2, seed=0)
    features = PixelFeatures(64).extract(to_images(draw(pipeline, shots, SAMPLING)))
    distances = [mean_pairwise_distance(features[i : i + 2]) for i in (0, 2, 4)]
    standard = report.diversity["standard"]
    assert standard["distance"] == pytest.approx(sum(distances) / 3, rel=1e-4)
    assert standard["ratio"] == 1
    low, high = report.diversity["golden"]["ratio_interval"]
    assert low <= report.diversity["golden"]["ratio"] <= high


def test_unchanged_noise_changes_nothing(pipeline):
    report = evaluate(pipeline, refine=unmoved, num_images_per_prompt=2)
    (found,) = report.scores["golden"].values()
    assert (found["win_rate"], found["ties"], found["difference"]) == (0.5, 6, 0)
    assert report.diversity["golden"]["ratio_interval"] == [1, 1]
    assert report.noise["golden"]["change"] == 0


def test_several_share_the_standard_pictures(pipeline):
    together = evaluate(pipeline, refine={"far": moved, "near": unmoved})
    for name, refine in (("far", moved), ("near", unmoved)):
        alone = evaluate(pipeline, refine=refine)
        assert together.scores[name] == alone.scores["golden"]
    assert list(together.noise) == ["standard", "far", "near"]
    assert list(together.cost) == ["standard", "far", "near", "score"]


def test_the_batch_size_changes_nothing_but_rounding(pipeline):
    first, second = (evaluate(pipeline, num_images_per_prompt=3, batch_size=size, best_of=2) for size in (2, 9))
    for one, other in zip(first.rows, second.rows, strict=True):
        assert one.keys() == other.keys()
        names = [name for name in one if name != "prompt"]
        assert [one[n] for n in names] == pytest.approx([other[n] for n in names], abs=0.02)


def test_best_of_several_noises(pipeline):
    report = evaluate(pipeline, rewards=REWARDS, best_of=3, num_images_per_prompt=2)
    best = [row["best of 3/brightness 1"] for row in report.rows]
    assert all(b >= row["standard/brightness 1"] for b, row in zip(best, report.rows, strict=True))
    shots = shots_of(PROMPTS, 2, seed=0)
    candidates = [shots] + [
        [s._replace(seed=image_seed(s.seed, s.prompt, s.index, f"candidate-{k}")) for s in shots] for k in (1, 2)
    ]
    images = [to_images(draw(pipeline, c, SAMPLING)) for c in candidates]
    scores = torch.stack([Brightness().score(i, PROMPTS) for i in images], dim=1)
    assert best == pytest.approx(scores.amax(1).tolist(), abs=1e-2)
    redness = torch.stack([Redness().score(i, PROMPTS) for i in images], dim=1)
    chosen = redness.gather(1, scores.argmax(1, keepdim=True)).flatten().tolist()
    assert [row["best of 3/redness 3"] for row in report.rows] == pytest.approx(chosen, abs=1e-4)
    found = report.best_of
    assert found["count"] == 3
    assert found["expected"]["brightness 1"][2] == pytest.approx(sum(best) / 6)
    assert found["expected"]["brightness 1"][0] == pytest.approx(scores.mean().item(), abs=1e-2)
    one, score = report.cost["standard"]["seconds"], report.cost["score"]["seconds"]
    assert found["seconds"] == pytest.approx([one, 2 * (one + score), 3 * (one + score)])
    against = found["against"]["golden"]
    taken = report.cost["golden"]["seconds"]
    assert against["time_ratio"] == pytest.approx(taken / found["seconds"][2])
    assert evaluate(pipeline, best_of=1).best_of == {}


def test_seeds_may_be_given(pipeline):
    report = evaluate(pipeline, seeds=[7, 3], prompts=[*PROMPTS, PROMPTS[0]])
    assert [row["seed"] for row in report.rows] == [7, 3] * 3
    assert (report.settings["seeds"], report.settings["seed"]) == ([7, 3], None)
    assert report.settings["num_images_per_prompt"] == 2


def test_many_prompts_are_resampled_whole(pipeline):
    prompts = [f"a red {word}" for word in "one two three four five six seven eight nine zero".split()]
    report = evaluate(pipeline, prompts=prompts, num_inference_steps=1, batch_size=10)
    assert report.settings["resampled"] == "prompts"


def test_settings_name_what_was_measured(pipeline):
    network = small_network()
    report = evaluate(pipeline, refine=network, golden_noise_scale=0.5, rewards=REWARDS)
    settings = report.settings
    assert settings["rewards"] == ["brightness 1", "redness 3"]
    assert same_fingerprint(settings["base_fingerprint"], fingerprint(pipeline.unet, 16))
    facts = settings["subjects"]["golden"]
    assert same_fingerprint(facts["fingerprint"], fingerprint(network, 16))
    assert (facts["class"], facts["golden_noise_scale"]) == ("GoldenNoiseModel", 0.5)
    count = sum(p.numel() for p in network.parameters())
    assert (facts["parameters"], facts["parameter_bytes"]) == (count, 4 * count)
    assert report.cost["golden"]["parameter_bytes"] == 4 * count
    assert (settings["latent_shape"], settings["scheduler"]) == ([4, 8, 8], "DDIMScheduler")
    assert report.cost["golden"]["extra_seconds"] > 0


def test_a_target_and_a_network_are_called_with_the_prompts(pipeline):
    target = RedenoisedTarget(pipeline, 2, num_steps=4)
    report = evaluate(pipeline, refine={"target": target, "network": small_network()})
    assert report.settings["subjects"]["target"]["repeats"] == 2
    for side in ("target", "network"):
        assert report.noise[side]["change"] > 1e-3
        assert report.noise[side]["std"] == pytest.approx(report.noise["standard"]["std"], rel=0.02)


def test_a_golden_pipeline_brings_its_network():
    pipeline = golden_pipeline("sd")
    network, config = pipeline.noise_model, dict(pipeline.config)
    found = evaluate(pipeline, refine=None)
    assert pipeline.noise_model is network
    assert dict(pipeline.config) == config
    pipeline.noise_model = None
    expected = evaluate(pipeline, refine=NetworkRefiner(network))
    assert found.rows == expected.rows
    assert found.noise["golden"]["change"] > 0


@pytest.mark.parametrize("stops", [False, True])
def test_the_pipeline_is_left_as_it_was(pipeline, stops):
    pipeline.unet.train()
    pipeline.unet.mid_block.eval()
    modes = [module.training for module in pipeline.unet.modules()]
    weights = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    scheduler, bar = pipeline.scheduler, dict(pipeline._progress_bar_config)
    state = dict(vars(scheduler))

    class Stops(Constant):
        def score(self, images, prompts):
            raise RuntimeError("stop")

    if stops:
        with pytest.raises(RuntimeError, match="stop"):
            evaluate(pipeline, rewards=Stops())
    else:
        evaluate(pipeline, refine=small_network())
    assert [module.training for module in pipeline.unet.modules()] == modes
    assert pipeline.scheduler is scheduler
    assert vars(scheduler).keys() == state.keys()
    assert scheduler.num_inference_steps == state["num_inference_steps"]
    assert pipeline._progress_bar_config == bar
    assert all(torch.equal(weights[n], v) for n, v in pipeline.unet.state_dict().items())


class TwoEach(Constant):
    def score(self, images, prompts):
        return torch.ones(len(images), 2)


class Nameless:
    def score(self, images, prompts):
        return torch.ones(len(images))


def cropped(noise, text):
    return noise[..., :-1]


def broken(noise, text):
    return noise * torch.nan


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "`prompts` must be a non-empty list of strings, got none"),
        ({"prompts": "a red seven"}, "`prompts` must be a list of prompts, got the string"),
        ({"prompts": ["a", None]}, r"non-empty list of strings, got \[None\]"),
        ({"prompts": ["a red nine"], "rewards": BrokenForNine()}, "'broken' must be numbers, got nan"),
        ({"rewards": TwoEach()}, r"'constant' must have shape \(3,\), one per image, got \(3, 2\)"),
        ({"rewards": []}, "`rewards` must hold at least one reward"),
        ({"rewards": [Brightness()] * 2}, "must differ in name or version, got 'brightness 1' twice"),
        ({"refine": None}, "`refine` must be a golden-noise network or a function"),
        ({"refine": {}}, "`refine` must be a golden-noise network or a function"),
        ({"refine": {"a/b": moved}}, "must have names without '/'"),
        ({"refine": {"best of 4": moved}}, "that do not start with one of .*got 'best of 4'"),
        ({"refine": cropped}, r"finite noise of shape \(1, 4, 8, 8\), got \(1, 4, 8, 7\) from 'golden"),
        ({"refine": broken}, r"got \(1, 4, 8, 8\) with NaN from 'golden'"),
        ({"refine": small_network(64)}, "`prompt_embeds` must be 64 wide for this network, got 128"),
        ({"num_images_per_prompt": 0}, "`num_images_per_prompt` must be at least 1, got 0"),
        ({"best_of": 0}, "`best_of` must be at least 1, got 0"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"seeds": []}, "`seeds` must be distinct and not negative, one at least"),
        ({"seeds": [3, 3]}, r"must be distinct and not negative, one at least, got \[3, 3\]"),
        ({"seeds": [-1]}, "`seeds` must be distinct and not negative"),
    ],
)  # fmt: skip
def test_bad_input(pipeline, arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate(pipeline, **arguments)


def test_other_kinds_are_refused(pipeline):
    with pytest.raises(TypeError, match=r"got .*Nameless.* without \['name', 'version'\]"):
        evaluate(pipeline, rewards=Nameless())
    with pytest.raises(TypeError, match="must hold golden-noise networks or functions.*got int"):
        evaluate(pipeline, refine={"one": unmoved, "two": 3})


def test_what_does_not_fit_is_found_before_anything_is_drawn(pipeline, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("drawn")

    monkeypatch.setattr(type(pipeline), "__call__", never)
    with pytest.raises(ValueError, match="`refine` must give finite noise"):
        evaluate(pipeline, refine={"good": unmoved, "bad": cropped})


def test_pictures_that_are_not_finite_are_refused(pipeline):
    with torch.no_grad():
        pipeline.vae.decoder.conv_out.bias.fill_(torch.nan)
    with pytest.raises(ValueError, match="must draw finite pictures, got NaN"):
        evaluate(pipeline)


@pytest.fixture
def text(pipeline):
    return encode_prompts(pipeline, PROMPTS)


def unit_noise() -> torch.Tensor:
    return torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def test_the_target_is_redenoised_noise_of_the_same_spectrum(pipeline, text):
    noise, step = unit_noise(), {"num_steps": 4, "w1": 3.0, "w2": 0.5}
    once = match_energy(redenoise_text(pipeline, noise, text, **step), noise)
    found = RedenoisedTarget(pipeline, 1, **step)(noise, text)
    assert torch.allclose(found, match_spectrum(once, noise), atol=1e-6)
    twice = match_energy(redenoise_text(pipeline, once, text, **step), noise)
    found = RedenoisedTarget(pipeline, 2, **step)(noise, text)
    assert torch.allclose(found, match_spectrum(twice, noise), atol=1e-6)
    assert torch.allclose(found.square().mean((1, 2, 3)), noise.square().mean((1, 2, 3)))
    assert (found - noise).abs().max() > 1e-3


def test_a_network_gets_text_mask_and_scale(text):
    network, noise = small_network(), unit_noise()
    found = NetworkRefiner(network, 0.5)(noise, text)
    assert torch.equal(found, network.refine(noise, text.prompt_embeds, scale=0.5))
    assert torch.equal(NetworkRefiner(network, 0.0)(noise, text), noise)


def test_names():
    network = small_network()
    assert list(name_subjects(moved)) == ["golden"]
    found = name_subjects({"a": moved, "b": network}, 0.25)
    assert found["a"] is moved
    assert (found["b"].network, found["b"].scale) == (network, 0.25)


def test_repeats_below_one_are_refused(pipeline):
    with pytest.raises(ValueError, match="`repeats` must be at least 1, got 0"):
        RedenoisedTarget(pipeline, 0)
