from __future__ import annotations

import asyncio
import contextvars

import torch

from diffusers_ext.core.restored_state import CallScope
from tests.in_a_thread import in_a_thread


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
