"""One transformer with erasers, used by several threads at once."""

from __future__ import annotations

import contextvars
import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from diffusers_ext.eraser.adapter.outputs import eraser_layers, eraser_outputs, eraser_scaled, erasers_disabled
from diffusers_ext.eraser.adapter.thread_state import ThreadGate, ThreadScale
from tests.eraser.saved_erasers import inputs, make_eraser, run
from tests.in_a_thread import in_a_thread
from tests.tiny_cogvideox import TEXT_WIDTH, tiny_transformer


@pytest.fixture(scope="module")
def transformer():
    return make_eraser(tiny_transformer())


@pytest.fixture(scope="module")
def base():
    return run(tiny_transformer())


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_an_eraser_is_on_again_after_two_threads_switched_it_off(transformer):
    erased = run(transformer)

    def switch() -> None:
        for _ in range(200):
            with erasers_disabled(transformer):
                pass

    threads = [threading.Thread(target=switch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first, second = erasers_disabled(transformer), erasers_disabled(transformer)
    first.__enter__(), second.__enter__(), first.__exit__(None, None, None)
    assert not torch.equal(run(transformer), erased)
    second.__exit__(None, None, None)
    assert torch.equal(run(transformer), erased)
    assert all(not layer.off for layer in eraser_layers(transformer).values())


def test_another_request_keeps_its_eraser(transformer, base):
    erased = run(transformer)
    with erasers_disabled(transformer):
        assert torch.equal(in_a_thread(lambda: run(transformer)), erased)
        assert torch.equal(run(transformer), base)
        # A worker that gets a copy of the context does what its request asked for.
        context = contextvars.copy_context()
        assert torch.equal(in_a_thread(lambda: context.run(run, transformer)), base)
    assert torch.equal(in_a_thread(lambda: context.run(run, transformer)), erased)


@torch.no_grad()
def test_prompts_of_different_lengths_at_once(transformer):
    def ask(text: int) -> torch.Tensor:
        tokens = torch.randn(2, text, TEXT_WIDTH, generator=torch.Generator().manual_seed(text))
        given = inputs(transformer) | {"encoder_hidden_states": tokens}
        return transformer(**given, return_dict=False)[0]

    lengths = [4, 12, 7, 9] * 10
    expected = [ask(text) for text in lengths]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(ask, lengths))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_outputs_of_other_threads_are_not_kept(transformer):
    with eraser_outputs(transformer) as outputs:
        in_a_thread(lambda: run(transformer))
        assert outputs == {}
        run(transformer)
    assert len(outputs) == 2


def test_checkpointed_blocks_are_recomputed_as_they_were():
    transformer = tiny_transformer().train()
    make_eraser(transformer)
    transformer.requires_grad_(True)
    transformer.enable_gradient_checkpointing()
    plain = tiny_transformer().train()
    plain(**inputs(plain), return_dict=False)[0].square().mean().backward()
    with erasers_disabled(transformer):
        loss = transformer(**inputs(transformer), return_dict=False)[0].square().mean()
        # As the threads of autograd do on a GPU, without the context of the caller.
        contextvars.Context().run(loss.backward)
    found = dict(transformer.named_parameters())
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter.grad, found[name].grad), name
    assert all(p.grad is None for name, p in found.items() if "eraser_" in name)


def test_one_graph_for_threads_with_and_without_erasers(fresh_compiler, base):
    transformer = make_eraser(tiny_transformer(num_layers=1), "seven")
    erased, plain = run(transformer), run(tiny_transformer(num_layers=1))
    counter = CompileCounter()
    compiled = torch.compile(transformer, backend=counter, fullgraph=True)
    torch.testing.assert_close(in_a_thread(lambda: run(compiled)), erased)
    with erasers_disabled(compiled):
        torch.testing.assert_close(run(compiled), plain)
        torch.testing.assert_close(in_a_thread(lambda: run(compiled)), erased)
    context = erasers_disabled(compiled)
    context.__enter__()
    in_a_thread(lambda: context.__exit__(None, None, None))
    torch.testing.assert_close(run(compiled), erased)
    assert counter.frame_count == 1


def test_a_graph_reads_the_scale_of_the_calling_thread(fresh_compiler, base):
    transformer = make_eraser(tiny_transformer(num_layers=1), "seven")
    erased, plain = run(transformer), run(tiny_transformer(num_layers=1))
    for layer in eraser_layers(transformer).values():
        layer.set_scale("seven", 0.0)
    counter = CompileCounter()
    compiled = torch.compile(transformer, backend=counter, fullgraph=True)
    torch.testing.assert_close(run(compiled), plain)
    with eraser_scaled(compiled, "seven", 1.0):
        torch.testing.assert_close(run(compiled), erased)
        torch.testing.assert_close(in_a_thread(lambda: run(compiled)), plain)
        assert torch.equal(run(transformer), erased)
        assert torch.equal(in_a_thread(lambda: run(transformer)), plain)
    torch.testing.assert_close(run(compiled), plain)
    assert counter.frame_count == 1


def test_a_compiled_model_notices_that_an_eraser_came_and_went(fresh_compiler):
    transformer = tiny_transformer(num_layers=1)
    plain = run(transformer)
    compiled = torch.compile(transformer, backend="eager", fullgraph=True)
    torch.testing.assert_close(run(compiled), plain)
    make_eraser(transformer)
    assert not torch.allclose(run(compiled), plain, atol=1e-3)
    torch.testing.assert_close(run(compiled), run(transformer))
    transformer.unload_lora()
    torch.testing.assert_close(run(compiled), plain)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda gate: pickle.loads(pickle.dumps(gate))])
def test_a_copied_gate_is_open(duplicate):
    scale = ThreadScale()
    scale.add(0.5)
    assert duplicate(scale).added == 0
    gate = ThreadGate()
    first, second = gate.close(), gate.close()
    assert duplicate(gate).openness == 1
    first()
    assert gate.openness == 0
    second()
    assert gate.openness == 1
