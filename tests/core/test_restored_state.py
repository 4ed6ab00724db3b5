from __future__ import annotations

import asyncio
import contextvars
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

from diffusers_ext.core.restored_state import CallScope, held_attribute, module_eval_mode, quiet_run
from tests.in_a_thread import in_a_thread


@pytest.fixture
def pipeline() -> DDIMPipeline:
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        norm_num_groups=4,
    )
    return DDIMPipeline(unet, DDIMScheduler())


def test_the_pipelines_own_scheduler_is_not_used(pipeline):
    scheduler = pipeline.scheduler
    timesteps = scheduler.timesteps.clone()
    with quiet_run(pipeline):
        assert pipeline.scheduler is not scheduler
        pipeline(num_inference_steps=2, output_type="np")
    assert pipeline.scheduler is scheduler
    assert scheduler.timesteps.equal(timesteps)
    assert scheduler.num_inference_steps is None


def test_the_progress_bar_is_off_inside(pipeline, capsys):
    with quiet_run(pipeline):
        pipeline(num_inference_steps=2, output_type="np")
    assert capsys.readouterr().err == ""
    pipeline(num_inference_steps=2, output_type="np")
    assert "2/2" in capsys.readouterr().err


@pytest.mark.parametrize("settings", [None, {"desc": "mine", "leave": False}])
def test_the_users_bar_settings_come_back_after_an_exception(pipeline, settings):
    if settings is not None:
        pipeline.set_progress_bar_config(**settings)
    before = dict(vars(pipeline))
    with pytest.raises(KeyError), quiet_run(pipeline):
        raise KeyError("interrupted")
    assert vars(pipeline) == before
    assert getattr(pipeline, "_progress_bar_config", None) == settings


def test_runs_that_overlap_leave_what_the_first_found(pipeline):
    scheduler, unet = pipeline.scheduler, pipeline.unet.train()
    before = dict(vars(pipeline))
    modes = {name: part.training for name, part in unet.named_modules()}
    first, second = quiet_run(pipeline), quiet_run(pipeline)
    first.__enter__()
    with module_eval_mode(unet.conv_in):
        second.__enter__()
    first.__exit__(None, None, None)
    assert pipeline.scheduler is not scheduler
    assert not any(part.training for part in unet.modules())
    second.__exit__(None, None, None)
    assert vars(pipeline) == before
    assert {name: part.training for name, part in unet.named_modules()} == modes


def test_it_covers_the_calls_of_its_own_thread():
    scope = CallScope()
    assert not scope.covers_this_call()
    with scope:
        assert scope.covers_this_call()
        assert not in_a_thread(scope.covers_this_call)
    assert not scope.covers_this_call()


def test_scopes_close_in_any_order_and_in_any_thread():
    first, second = CallScope(), CallScope()
    first.__enter__()
    second.__enter__()
    first.__exit__()
    assert [first.covers_this_call(), second.covers_this_call()] == [False, True]
    in_a_thread(second.__exit__)
    assert not second.covers_this_call()


def test_tasks_are_apart_and_worker_threads_with_their_context_inside():
    async def request(meet):
        with CallScope() as scope:
            await meet.wait()
            here = scope.covers_this_call(), await asyncio.to_thread(scope.covers_this_call)
        return here, scope

    async def serve():
        meet = asyncio.Event()
        tasks = [asyncio.create_task(request(meet)) for _ in range(2)]
        await asyncio.sleep(0)
        meet.set()
        return [(here, scope.covers_this_call()) for here, scope in await asyncio.gather(*tasks)]

    assert asyncio.run(serve()) == [((True, True), False)] * 2


def test_a_backward_pass_belongs_to_where_it_was_called():
    asked = []

    class Ask(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            asked.append(contextvars.Context().run(scope.covers_this_call))
            return gradient

    scope = CallScope()
    loss = [Ask.apply(torch.ones(2, requires_grad=True)).sum() for _ in range(2)]
    with scope:
        # The threads of autograd have an empty context, as here.
        assert not contextvars.Context().run(scope.covers_this_call)
        loss[0].backward()
    loss[1].backward()
    assert asked == [True, False]


def test_what_torch_stashes_is_held_as_long_as_it_is_stashed():
    scopes, seen = [CallScope() for _ in range(3)], []
    counts = [sys.getrefcount(scope) for scope in scopes]
    for _ in range(50):  # torch 2.7 took references back that it had never counted
        with scopes[0], scopes[1]:
            x = torch.ones(2, requires_grad=True)
            x.register_hook(lambda grad: seen.append(scopes[1].covers_this_call()))
            x.sum().backward()
        with scopes[2]:
            pass
    assert [sys.getrefcount(scope) for scope in scopes] == counts
    assert seen == [True] * 50


def test_the_last_one_restores_whatever_the_order():
    owner = SimpleNamespace(mode="train")
    contexts = [held_attribute(owner, "mode", value) for value in ("a", "b", "c")]
    for context in contexts:
        context.__enter__()
    contexts[0].__exit__(None, None, None)
    assert owner.mode == "c"
    contexts[2].__exit__(None, None, None)
    assert owner.mode == "b"
    contexts[1].__exit__(None, None, None)
    assert owner.mode == "train"


def test_an_absent_attribute_goes_again_also_after_an_exception():
    owner = SimpleNamespace()
    with pytest.raises(RuntimeError, match="stop"), held_attribute(owner, "bar", None):
        raise RuntimeError("stop" if vars(owner) == {"bar": None} else "not held")
    assert vars(owner) == {}


def test_what_the_class_has_for_all_does_not_become_the_owners():
    class Reader:
        length = 3

        def read(self) -> str:
            return "read"

    owner, contexts = Reader(), []
    for name, value in (("read", lambda: "handed on"), ("read", lambda: "again"), ("length", 4)):
        contexts.append(held_attribute(owner, name, value))
        contexts[-1].__enter__()
    assert (owner.read(), owner.length) == ("again", 4)
    for context, left in zip(contexts, ({"read", "length"}, {"length"}, set()), strict=True):
        context.__exit__(None, None, None)
        assert set(vars(owner)) == left
    assert (owner.read(), owner.length) == ("read", 3)


def test_many_threads_leave_it_as_it_was():
    owner, seen = SimpleNamespace(mode="train"), set()

    def hold() -> None:
        for _ in range(200):
            with held_attribute(owner, "mode", "eval"):
                seen.add(owner.mode)

    threads = [threading.Thread(target=hold) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"eval"}
    assert owner.mode == "train"


def test_a_writer_of_its_own():
    written = []
    with held_attribute(SimpleNamespace(x=1), "x", 2, lambda *args: written.append(args[1:])):
        pass
    assert written == [("x", 2), ("x", 1)]
