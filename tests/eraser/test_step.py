from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.data import default_collate

from diffusers_ext.eraser.batch import States, rows_of_each_kind
from diffusers_ext.eraser.recipe import EraserTraining
from diffusers_ext.training.eraser.run import make_step
from tests.training.eraser_runs import tiny_training

RECIPE = EraserTraining(
    rank=4,
    negative_guidance=1.5,
    num_target_trajectories=2,
    num_preserved_trajectories=2,
    num_inference_steps=4,
    localization_weight=0.5,
    empty_share=0.5,
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained():
    return tiny_training(RECIPE)


def make(trained, **changes):
    pipeline, data, _ = trained
    return make_step(pipeline, data, dataclasses.replace(RECIPE, **changes), CPU)


def batch_of(data, numbers=(0, 3, 5, 7)):
    return default_collate([data.samples[number] for number in numbers])


def velocity(step, x_t, t, embeds):
    with torch.no_grad():
        return step.maker.velocity(x_t, t, embeds)


def test_the_loss_is_what_its_formula_says(trained):
    pipeline, data, _ = trained
    step, batch = make(trained), batch_of(data)
    target, kept = batch["target"], batch["preserved"]
    wanted = target["v_anchor"] - 1.5 * (target["v_concept"] - target["v_anchor"])
    asked = velocity(step, target["x_t"], target["t"], data.text.target[target["prompt"]])
    embeds = torch.stack([
        data.text.empty if number < 0 else data.text.preserved[number] for number in kept["prompt"]
    ])  # fmt: skip
    assert (kept["prompt"] < 0).any()
    assert (kept["prompt"] >= 0).any()
    same = velocity(step, kept["x_t"], kept["t"], embeds)
    losses = step(pipeline.transformer, batch, torch.Generator())
    unlearning, preservation = (asked - wanted).square().mean(), (same - kept["velocity"]).square()
    torch.testing.assert_close(losses["unlearning"], unlearning)
    torch.testing.assert_close(losses["preservation"], preservation.mean())
    total = unlearning + 2 * preservation.mean() + 0.5 * losses["localization"]
    torch.testing.assert_close(losses["loss"], total)
    start = (target["v_concept"] - wanted).square().mean()
    torch.testing.assert_close(losses["erased"], 1 - unlearning / start)


def test_what_is_added_outside_of_the_mask_is_counted(trained):
    pipeline, data, _ = trained
    step, batch = make(trained), batch_of(data)
    batch["target"]["mask"] = torch.ones_like(batch["target"]["mask"])
    everywhere = step(pipeline.transformer, batch, torch.Generator())["localization"]
    batch["target"]["mask"] = torch.zeros_like(batch["target"]["mask"])
    nowhere = step(pipeline.transformer, batch, torch.Generator())["localization"]
    assert everywhere == 0 < nowhere


@pytest.mark.parametrize("live", [False, True])
def test_nothing_but_the_eraser_gets_a_gradient(live, trained):
    pipeline, data, parameters = trained
    batch = {"x_0": torch.randn(2, 3, 4, 4, 4)} if live else batch_of(data)
    step = make(trained)
    pipeline.transformer.zero_grad()
    step(pipeline.transformer, batch, torch.Generator())["loss"].backward()
    reached = [p for p in pipeline.transformer.parameters() if p.grad is not None]
    assert {*map(id, reached)} == {*map(id, parameters)}
    assert all(parameter.grad.any() for parameter in parameters)
    known = step.maker.teacher_rows(batch, torch.Generator())
    assert not any(velocities.requires_grad for velocities in known[2:])


@pytest.mark.parametrize("in_turn", [False, True])
@pytest.mark.parametrize("heads", ["kept", "found"])
def test_the_teacher_asked_now_says_what_was_kept(heads, in_turn, trained):
    pipeline, data, _ = trained
    batch = batch_of(data)
    bare = dataclasses.replace(data, samples=None)
    given = (pipeline, data if heads == "kept" else bare, None)
    step = make(given, separate_passes=in_turn)
    target, kept = batch["target"], batch["preserved"]
    states = [States(part["x_t"], part["t"], part["prompt"]) for part in (target, kept)]
    v_concept, v_anchor, v_preserved, mask = step.maker.ask_teacher(*states)
    torch.testing.assert_close(v_concept, target["v_concept"])
    torch.testing.assert_close(v_anchor, target["v_anchor"])
    torch.testing.assert_close(v_preserved, kept["velocity"])
    torch.testing.assert_close(mask, target["mask"], rtol=0, atol=5e-3)  # roots of small differences
    assert torch.equal(step.maker._heads(target["x_t"].shape[1:]), data.samples.head_weights)


def test_without_an_anchor_the_empty_prompt_is_not_asked_for_twice(trained):
    pipeline, data, _ = trained
    text = data.text._replace(anchor=data.text.empty.expand_as(data.text.target))
    asked = []
    for given in (data, dataclasses.replace(data, text=text)):
        step, batch = make((pipeline, given, None)), batch_of(data)
        states = [States(p["x_t"], p["t"], p["prompt"]) for p in batch.values()]
        hook = pipeline.transformer.register_forward_pre_hook(
            lambda *call: asked.append(len(call[2]["hidden_states"])), with_kwargs=True
        )
        with hook:
            *_, mask = step.maker.ask_teacher(*states)
        assert mask.amax() > 0
    assert asked == [16, 12]


def test_no_target_rows_have_no_masks(trained):
    _, data, _ = trained
    batch = batch_of(data)
    states = [States(p["x_t"], p["t"], p["prompt"]) for p in batch.values()]
    nothing = States(*(part[:0] for part in states[0]))
    *_, v_preserved, mask = make(trained).maker.ask_teacher(nothing, states[1])
    assert mask.shape == (0, 3, 4, 4)
    torch.testing.assert_close(v_preserved, batch["preserved"]["velocity"])


@pytest.mark.parametrize(("live", "passes"), [(False, 1), (True, 2)])
def test_passes_of_a_step(live, passes, trained):
    pipeline, data, _ = trained
    batch = {"x_0": torch.randn(2, 3, 4, 4, 4)} if live else batch_of(data)
    step, calls = make(trained), []
    hook = pipeline.transformer.register_forward_hook(lambda *_: calls.append(1))
    try:
        step(pipeline.transformer, batch, torch.Generator())
    finally:
        hook.remove()
    assert len(calls) == passes


def test_all_random_numbers_come_from_the_generator(trained):
    pipeline, _, _ = trained
    step, batch = make(trained), {"x_0": torch.randn(4, 3, 4, 4, 4)}
    losses = []
    for seed, elsewhere in ((1, 0), (1, 7), (2, 0)):
        torch.manual_seed(elsewhere)
        generator = torch.Generator().manual_seed(seed)
        losses.append(step(pipeline.transformer, batch, generator)["loss"].item())
    assert losses[0] == losses[1] != losses[2]


def test_rows_out_of_the_range_of_timesteps_do_not_count(trained):
    pipeline, data, _ = trained
    batch = batch_of(data)
    times = batch["target"]["t"]
    low = int(times.min()) + 1
    found = make(trained, min_timestep=low)(pipeline.transformer, batch, torch.Generator())
    inside = (times >= low).nonzero().flatten().tolist()
    assert 0 < len(inside) < len(times)
    batch["target"] = {name: value[inside] for name, value in batch["target"].items()}
    alone = make(trained, preserved_share=0.5)
    batch["preserved"] = {name: v[: len(inside)] for name, v in batch["preserved"].items()}
    expected = alone(pipeline.transformer, batch, torch.Generator())
    torch.testing.assert_close(found["unlearning"], expected["unlearning"])


def test_the_empty_prompt_can_count_for_nothing(trained):
    pipeline, data, _ = trained
    batch = batch_of(data)
    found = make(trained, empty_weight=0.0)(pipeline.transformer, batch, torch.Generator())
    named = (batch["preserved"]["prompt"] >= 0).nonzero().flatten().tolist()
    kept = {name: value[named] for name, value in batch["preserved"].items()}
    batch = {"target": {name: v[: len(named)] for name, v in batch["target"].items()}, "preserved": kept}
    expected = make(trained)(pipeline.transformer, batch, torch.Generator())
    torch.testing.assert_close(found["preservation"], expected["preservation"])


@pytest.mark.parametrize(
    ("batch_size", "share", "rows"),
    [(4, 0.5, (4, 4)), (4, 0.2, (4, 1)), (4, 0.8, (1, 4)), (1, 0.3, (1, 1)), (3, 0.0, (3, 0))],
)
def test_rows_of_each_kind(batch_size, share, rows):
    assert rows_of_each_kind(batch_size, share) == rows


def test_preserved_rows_without_weight_are_left_out(trained):
    pipeline, data, _ = trained
    step = make(trained, preservation_weight=0.0, localization_weight=0.0)
    losses = step(pipeline.transformer, batch_of(data), torch.Generator())
    assert set(losses) == {"loss", "unlearning", "erased"}
    assert losses["loss"] == losses["unlearning"]


def test_localization_without_masks(trained):
    pipeline, data, _ = trained
    batch = batch_of(data)
    del batch["target"]["mask"]
    with pytest.raises(ValueError, match="`localization_weight` must be 0 for samples without"):
        make(trained)(pipeline.transformer, batch, torch.Generator())
    bare = dataclasses.replace(data, token_mask=None)
    with pytest.raises(ValueError, match="`token_mask` must be given"):
        make((pipeline, bare, None), latents_source="noise")
