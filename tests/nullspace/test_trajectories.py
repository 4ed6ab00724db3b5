from __future__ import annotations

import copy
import operator
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline

from benchmarks.precision_of_statistics import principal_angle
from diffusers_ext.nullspace import collect as trajectories
from diffusers_ext.nullspace.collect import collect_statistics, shared_inputs
from diffusers_ext.nullspace.directions import generalized_directions
from diffusers_ext.nullspace.slots import FEATURES, find_linears
from diffusers_ext.nullspace.statistics import FeatureStatistics
from tests.tiny_digits import random_digits_pipeline
from tests.tiny_pipelines import sdxl_pipeline

PROMPTS = ["a red seven", "a blue one", "a white nine", "a green two"]  # and the empty prompt
REST = tuple(feature for feature in FEATURES if feature not in ("k", "v"))
RUN = {"num_inference_steps": 2, "show_progress": False, "seed": 5}


@pytest.fixture
def pipeline():
    return random_digits_pipeline()


def small_run(pipeline, prompts=PROMPTS, **arguments) -> FeatureStatistics:
    """Five batches of one prompt, one layer."""
    arguments = {"features": ("q", "out"), "layers": [3], "batch_size": 1, **RUN, **arguments}
    return collect_statistics(pipeline, prompts, **arguments)


def assert_same_totals(first: FeatureStatistics, second: FeatureStatistics) -> None:
    assert first.moments.keys() == second.moments.keys()
    assert first.sources == second.sources
    for key, moment in first.moments.items():
        other = second.moments[key]
        assert moment.total.equal(other.total)
        assert (moment.count, moment.floor) == (other.count, other.floor)


class Interrupter:
    """Stands before `StableDiffusionPipeline.__call__`: counts calls, fails at a chosen one."""

    def __init__(self, monkeypatch, fail_at: int | None = None) -> None:
        self.calls, self.fail_at = 0, fail_at
        original = StableDiffusionPipeline.__call__

        def call(pipeline, *args, **kwargs):
            self.calls += 1
            if self.calls == self.fail_at:
                raise KeyboardInterrupt
            return original(pipeline, *args, **kwargs)

        monkeypatch.setattr(StableDiffusionPipeline, "__call__", call)


def test_a_share_of_the_tokens_gives_the_statistics_within_the_error_that_is_told(pipeline, tmp_path, monkeypatch):
    arguments = {"layers": [0], "num_inference_steps": 4}
    exact = small_run(pipeline, **arguments)
    arguments["token_share"] = 0.5
    sampled = small_run(pipeline, **arguments)
    assert sampled.facts["settings"]["run"]["token_share"] == 0.5
    assert "token_share" not in exact.facts["settings"]["run"]
    told = {row["matrix"]: row["sampling_error"] for row in sampled.report()}
    for key, moment in sampled.moments.items():
        assert moment.count == exact.moments[key].count
        error = (moment.mean - exact.moments[key].mean).norm() / exact.moments[key].mean.norm()
        assert 0 < error < 3 * told[key] < 0.5
    parts = [small_run(pipeline, shard=(index, 2), **arguments) for index in range(2)]
    parts[0].merge(parts[1])
    for key, moment in sampled.moments.items():
        torch.testing.assert_close(parts[0].moments[key].total, moment.total, rtol=1e-12, atol=1e-12)
    monkeypatch.setattr(trajectories, "_SAVE_EVERY", 2)
    with monkeypatch.context() as patched:
        Interrupter(patched, fail_at=4)
        with pytest.raises(KeyboardInterrupt):
            small_run(pipeline, progress_dir=tmp_path, **arguments)
    again = small_run(pipeline, progress_dir=tmp_path, **arguments)
    assert_same_totals(again, sampled)
    assert all(again.moments[key].variance == pytest.approx(m.variance) for key, m in sampled.moments.items())
    again.save_pretrained(tmp_path / "saved")
    assert FeatureStatistics.from_pretrained(tmp_path / "saved").report() == again.report()


def test_split_grams_give_the_statistics_and_tell_so(pipeline):
    arguments = {"layers": [0], "num_inference_steps": 2}
    exact, split = small_run(pipeline, **arguments), small_run(pipeline, gram_precision="bf16x3", **arguments)
    assert split.facts["settings"]["run"]["gram_precision"] == "bf16x3"
    assert "gram_precision" not in exact.facts["settings"]["run"]
    for key, moment in split.moments.items():
        other = exact.moments[key]
        assert (moment.count, moment.floor > other.floor) == (other.count, True)
        assert 0 < (moment.mean - other.mean).norm() < 1e-5 * other.mean.norm()
        new = torch.randn(moment.dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        spans = (generalized_directions(torch.outer(new, new), one.mean, 1, 1e-4).vectors for one in (moment, other))
        assert principal_angle(*spans) < 2  # degrees
    with pytest.raises(ValueError, match="`gram_precision` must be one of"):
        small_run(pipeline, gram_precision="float16", **arguments)


def test_a_share_that_leaves_too_few_tokens_is_refused_after_one_batch(pipeline, monkeypatch):
    calls = Interrupter(monkeypatch)
    with pytest.raises(ValueError, match=r"`token_share` must leave at least 4 tokens for each of the \d+ dimensions"):
        small_run(pipeline, token_share=0.01)
    assert calls.calls == 1
    for share in (0, 1.5):
        with pytest.raises(ValueError, match="`token_share` must be above 0 and at most 1, got"):
            small_run(pipeline, token_share=share)


@pytest.mark.parametrize("build", [random_digits_pipeline, sdxl_pipeline])
@pytest.mark.parametrize("negative", ["", "a white nine"])
def test_features_equal_a_dense_recomputation_of_a_real_run(build, negative):
    pipeline = build()
    if negative:  # noise at every step, by one generator per prompt
        pipeline.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    statistics = collect_statistics(
        pipeline, PROMPTS[:2], features=REST, layers=[0, 3], negative_prompt=negative,
        batch_size=2, guidance_scale=4.0, **RUN,
    )  # fmt: skip
    seen = recorded_inputs(pipeline, [*PROMPTS[:2], "", *([negative] if negative else [])], negative)
    assert set(seen) == set(statistics.sources)
    for name, rows in seen.items():
        moment = statistics.moments[statistics.key(name)]
        assert moment.count == len(rows)
        total = rows.double().T @ rows.double()
        torch.testing.assert_close(moment.total, total, rtol=0, atol=2e-6 * total.abs().max().item())


def recorded_inputs(pipeline, prompts: list[str], negative: str) -> dict[str, torch.Tensor]:
    """All inputs of the Linears `(vectors, width)` over runs of two prompts each."""
    seen: dict[str, list[torch.Tensor]] = {}
    linears = find_linears(pipeline.unet, REST, [0, 3])
    for name, module in linears.items():
        module.register_forward_pre_hook(
            lambda _, args, name=name: seen.setdefault(name, []).append(args[0].flatten(0, -2))
        )
    for start in range(0, len(prompts), 2):
        batch = prompts[start : start + 2]
        pipeline(
            batch,
            negative_prompt=[negative] * len(batch) if negative else None,
            num_inference_steps=2,
            guidance_scale=4.0,
            generator=[torch.Generator().manual_seed(5 + start + i) for i in range(len(batch))],
            output_type="latent",
        )
    return {name: torch.cat(parts) for name, parts in seen.items()}


def test_linears_with_one_input_share_one_matrix():
    names = [f"a.attn1.to_{s}" for s in "qkv"] + [f"a.attn2.to_{s}" for s in "qkv"] + ["a.ff.net.2"]
    assert shared_inputs(names) == {
        **dict.fromkeys(names[:3], "a.attn1.qkv"),
        names[3]: names[3],
        **dict.fromkeys(names[4:6], "a.attn2.kv"),
        names[6]: names[6],
    }


@pytest.mark.parametrize("parts", [2, 6])
def test_shards_sum_up_to_the_whole(pipeline, parts):
    whole = small_run(pipeline)
    merged, *others = [small_run(pipeline, shard=(i, parts)) for i in range(parts)]
    for shard in others:
        merged.merge(shard)
    for key, moment in whole.moments.items():
        assert merged.moments[key].count == moment.count
        difference = (merged.moments[key].total - moment.total).abs().max()
        assert difference <= 1e-14 * moment.total.abs().max()


@pytest.mark.parametrize("fail_at", [1, 2, 3, 5])
@pytest.mark.parametrize("save_every", [1, 2])
def test_interrupted_runs_continue_to_the_same_bits(pipeline, tmp_path, monkeypatch, fail_at, save_every):
    whole = small_run(pipeline)
    monkeypatch.setattr(trajectories, "_SAVE_EVERY", save_every)
    with monkeypatch.context() as patch:
        Interrupter(patch, fail_at)
        with pytest.raises(KeyboardInterrupt):
            small_run(pipeline, progress_dir=tmp_path)
    saved = (fail_at - 1) // save_every * save_every
    counted = Interrupter(monkeypatch)
    for _ in range(2):
        assert_same_totals(small_run(pipeline, progress_dir=tmp_path), whole)
        assert counted.calls == 5 - saved
    assert [path.name for path in (tmp_path / "part-0-of-1").iterdir()] == ["batches-5"]


@pytest.mark.parametrize(("owner", "name"), [(Path, "rename"), (shutil, "rmtree")])
def test_runs_killed_while_they_save_continue_to_the_same_bits(pipeline, tmp_path, monkeypatch, owner, name):
    whole = small_run(pipeline)
    monkeypatch.setattr(trajectories, "_SAVE_EVERY", 1)
    original, calls = getattr(owner, name), []

    def fail_at_the_third(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            small_run(pipeline, progress_dir=tmp_path)
    assert_same_totals(small_run(pipeline, progress_dir=tmp_path), whole)
    assert [path.name for path in (tmp_path / "part-0-of-1").iterdir()] == ["batches-5"]


@pytest.mark.parametrize(
    "change",
    [
        {"prompts": PROMPTS[:3]},
        {"seed": 6},
        {"layers": [2]},
        {"include_guidance_prompts": False},
        {"negative_prompt": "dark"},
    ],
)
def test_progress_of_another_collection_is_refused(pipeline, tmp_path, monkeypatch, change):
    small_run(pipeline, progress_dir=tmp_path)
    monkeypatch.setattr(pipeline.unet, "forward", None)
    with pytest.raises(ValueError, match="must hold the progress of this collection, got one with"):
        small_run(pipeline, progress_dir=tmp_path, **change)


def test_progress_with_another_schedule_or_model_is_refused(pipeline, tmp_path):
    small_run(pipeline, progress_dir=tmp_path)
    other = copy.copy(pipeline)
    other.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    for changed in (other, random_digits_pipeline(1)):
        with pytest.raises(ValueError, match="Remove it, or restore the old settings"):
            small_run(changed, progress_dir=tmp_path)


def test_damaged_progress_is_refused(pipeline, tmp_path):
    small_run(pipeline, progress_dir=tmp_path)
    path = tmp_path / "part-0-of-1" / "batches-5" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="it is truncated or was altered"):
        small_run(pipeline, progress_dir=tmp_path)


@pytest.mark.parametrize("fail_at", [None, 2])
def test_the_pipeline_is_left_as_it_was(pipeline, monkeypatch, fail_at):
    pipeline.unet.train()
    pipeline.unet.mid_block.eval()
    pipeline.set_progress_bar_config(desc="mine", disable=True)
    pipeline("a red seven", num_inference_steps=1, output_type="latent")
    modes = [module.training for module in pipeline.unet.modules()]
    scheduler, state = pipeline.scheduler, torch.get_rng_state()
    scheduled = copy.deepcopy(vars(scheduler))
    bar, processors = pipeline._progress_bar_config, dict(pipeline.unet.attn_processors)
    Interrupter(monkeypatch, fail_at)
    if fail_at is None:
        modes_inside = set()
        watch = pipeline.unet.register_forward_hook(
            lambda module, *_: modes_inside.update(part.training for part in module.modules())
        )
        small_run(pipeline)
        watch.remove()
        assert modes_inside == {False}
    else:
        with pytest.raises(KeyboardInterrupt):
            small_run(pipeline)
    assert pipeline.scheduler is scheduler
    assert vars(scheduler).keys() == scheduled.keys()
    for name, value in vars(scheduler).items():
        same = torch.equal if isinstance(value, torch.Tensor) else operator.eq
        assert same(value, scheduled[name]), name
    assert pipeline._progress_bar_config == bar == {"desc": "mine", "disable": True}
    assert pipeline.unet.attn_processors == processors
    assert [module.training for module in pipeline.unet.modules()] == modes
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in pipeline.unet.modules())
    assert torch.get_rng_state().equal(state)


def test_features_that_are_not_finite_are_refused_in_the_first_batch(pipeline, monkeypatch):
    with torch.no_grad():
        pipeline.unet.conv_in.bias[0] = float("nan")
    counted = Interrupter(monkeypatch)
    with pytest.raises(ValueError, match=r"attn2.to_(q|out.0)` must be finite, got .* trace nan"):
        small_run(pipeline)
    assert counted.calls == 1


def test_the_bar_counts_batches(pipeline, capsys):
    small_run(pipeline, PROMPTS[:1], show_progress=True)
    assert "statistics: 100%" in capsys.readouterr().err
