"""`separate_passes`: the plain step's losses and gradients in the memory of one kind of rows."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import default_collate

from diffusers_ext.eraser.recipe import EraserTraining
from diffusers_ext.eraser.step import run_separately
from diffusers_ext.planning.tracing import OperationTrace
from diffusers_ext.training.eraser.data import ClipSize
from diffusers_ext.training.eraser.prompts import GivenTexts
from diffusers_ext.training.eraser.run import add_eraser, make_data, make_step, parse_args, resume_facts
from tests.tiny_cogvideox import tiny_video_pipeline
from tests.training.eraser_runs import eraser_line, fill_eraser, tiny_prompts

RECIPE = EraserTraining(
    rank=4, localization_weight=0.5, num_target_trajectories=2, num_preserved_trajectories=2, num_inference_steps=4
)
OPTIONS = {
    "on_policy_share": 0.5,
    "adversarial_share": 0.5,
    "adversarial_every": 1,
    "adversarial_steps": 1,
    "num_adversarial_embeddings": 2,
}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained():
    pipeline = tiny_video_pipeline(num_layers=4)
    data = make_data(pipeline, tiny_prompts(), RECIPE, ClipSize(9, 16, 16), concept="seven")
    parameters = add_eraser(pipeline.transformer, RECIPE)
    fill_eraser(parameters)
    return pipeline, data, parameters


@pytest.fixture
def checkpointed(trained):
    """The pipeline's transformer with gradient checkpointing of its blocks."""
    transformer = trained[0].transformer
    transformer.enable_gradient_checkpointing()
    yield transformer.train()
    transformer.disable_gradient_checkpointing()
    transformer.eval()


def losses_and_gradients(trained, in_turn, *, batch=None, calls=1, model=None, half=False, **changes):
    """Losses of the last of some calls, the eraser's gradients, and bytes: peak and left over."""
    pipeline, data, parameters = trained
    recipe = dataclasses.replace(RECIPE, separate_passes=in_turn, **changes)
    step = make_step(pipeline, data, recipe, CPU)
    batch = default_collate([data.samples[i] for i in range(4)]) if batch is None else batch
    model = pipeline.transformer if model is None else model
    for number in range(calls):
        pipeline.transformer.zero_grad()
        with OperationTrace([*pipeline.transformer.parameters()]) as trace:
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                losses = step(model, batch, torch.Generator().manual_seed(number))
            losses["loss"].backward()
    losses = {name: value.detach() for name, value in losses.items()}
    return losses, [p.grad.clone() for p in parameters], trace.peak, trace.live


@pytest.mark.parametrize(("live", "changes"), [(False, {}), (True, {}), (False, {"calls": 2, **OPTIONS})])
def test_losses_and_gradients_are_those_of_one_pass(trained, live, changes):
    batch = {"x_0": torch.randn(4, 3, 4, 4, 4)} if live else None
    plain, in_turn = (losses_and_gradients(trained, turn, batch=batch, **changes)[:2] for turn in (False, True))
    torch.testing.assert_close(in_turn, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("localization", [0.0, 0.5])
def test_memory_with_gradient_checkpointing(trained, checkpointed, localization):
    plain, in_turn = (losses_and_gradients(trained, turn, localization_weight=localization) for turn in (False, True))
    torch.testing.assert_close(in_turn[:2], plain[:2], rtol=1e-4, atol=1e-6)
    assert in_turn[2] < 0.65 * plain[2]
    assert in_turn[3] == plain[3]  # no graph of the passes made again stays behind


def test_memory_without_gradient_checkpointing(trained):
    plain, in_turn = (losses_and_gradients(trained, turn)[2] for turn in (False, True))
    assert in_turn < 0.65 * plain


def test_mixed_precision(trained):
    plain, in_turn = (losses_and_gradients(trained, turn, half=True)[:2] for turn in (False, True))
    torch.testing.assert_close(in_turn, plain, rtol=0.05, atol=0.05)
    assert in_turn[0]["loss"] != losses_and_gradients(trained, True)[0]["loss"]


def test_under_the_wrapper_of_distributed_training(trained, tmp_path):
    plain = losses_and_gradients(trained, True)[:2]
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(trained[0].transformer)
        begun = []
        begin = wrapped._pre_forward
        wrapped._pre_forward = lambda *args, **kwargs: begun.append(1) or begin(*args, **kwargs)
        found = losses_and_gradients(trained, True, model=wrapped)[:2]
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(found, plain)
    assert len(begun) == 2


def test_teacher_and_student_are_asked_for_one_kind_at_a_time(trained):
    rows = []
    hook = trained[0].transformer.register_forward_pre_hook(
        lambda _, __, inputs: rows.append(len(inputs["hidden_states"])), with_kwargs=True
    )
    batch = {"x_0": torch.randn(4, 3, 4, 4, 4)}
    try:
        # concept, anchor, preserved; target, preserved; target again
        losses_and_gradients(trained, True, batch=batch, preserved_share=0.25, localization_weight=0.0)
        assert rows == [4, 4, 1, 4, 1, 4]
        rows.clear()
        losses_and_gradients(trained, True, preservation_weight=0.0, localization_weight=0.0)
        assert rows == [4]  # a single kind is not asked twice
    finally:
        hook.remove()


def test_the_flag_reaches_the_recipe_and_what_a_checkpoint_is_compared_with(trained, tmp_path):
    texts, base = GivenTexts([], [], []), SimpleNamespace(size=ClipSize(9, 16, 16))
    for flags in ([], ["--separate_passes"], ["--rows_in_turn"]):
        args = parse_args([*eraser_line(tmp_path, tmp_path / "out"), *flags])
        assert args.separate_passes is bool(flags)
        assert resume_facts(args, texts, base)["recipe"]["separate_passes"] is bool(flags)


def make_passes(weight, calls, *, count=3, depth=20):
    def one(number):
        calls.append(number)
        features = torch.full((64, 64), float(number + 1))
        for _ in range(depth):
            features = torch.dropout(torch.tanh(features @ weight), 0.2, train=True)
        return features.sum()

    return [lambda number=number: one(number) for number in range(count)]


def test_results_gradients_and_random_numbers_are_those_of_plain_calls():
    found = []
    for run in (run_separately, lambda passes: [one() for one in passes]):
        torch.manual_seed(0)
        weight, calls = torch.full((64, 64), 0.01, requires_grad=True), []
        results = run(make_passes(weight, calls))
        sum(results).backward()
        found.append((torch.stack(results).detach(), weight.grad))
        after = torch.rand(1)
    for ours, plain in zip(*found):
        torch.testing.assert_close(ours, plain)
    torch.manual_seed(0)
    [one() for one in make_passes(weight, [])]
    assert torch.equal(torch.rand(1), after)


def test_all_but_the_last_run_again_in_the_backward_pass_the_latest_first():
    weight, calls = torch.full((64, 64), 0.01, requires_grad=True), []
    results = run_separately(make_passes(weight, calls))
    assert calls == [0, 1, 2]
    sum(results).backward()
    assert calls == [0, 1, 2, 1, 0]


@pytest.mark.parametrize("count", [2, 4])
def test_any_number_of_passes_takes_the_memory_of_one(count):
    weight, peaks = torch.full((64, 64), 0.01, requires_grad=True), []
    for number in (1, count):
        weight.grad = None
        with OperationTrace([weight]) as trace:
            sum(run_separately(make_passes(weight, [], count=number))).backward()
        peaks.append(trace.peak)
    assert peaks[1] < 1.2 * peaks[0]


def test_no_passes():
    assert run_separately([]) == []
