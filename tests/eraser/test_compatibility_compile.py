"""Erasers under `torch.compile`: one graph, also after the scale changed."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from diffusers_ext.eraser.files import load_eraser, save_eraser
from tests.eraser.saved_erasers import make_eraser, run
from tests.tiny_cogvideox import tiny_transformer


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_one_graph_for_every_scale(fresh_compiler):
    transformer = make_eraser(tiny_transformer(num_layers=1), "seven")
    eager = {}
    for scale in (1.0, 0.5, 0.0, 1.3):
        transformer.set_adapters("seven", scale)
        eager[scale] = run(transformer)
    counter = CompileCounter()
    compiled = torch.compile(transformer, backend=counter, fullgraph=True)
    for scale, expected in eager.items():
        compiled.set_adapters("seven", scale)
        torch.testing.assert_close(run(compiled), expected)
    assert counter.frame_count == 1


def test_a_compiled_transformer_is_loaded_into_and_saved(tmp_path):
    transformer = make_eraser(tiny_transformer(num_layers=1), "seven")
    save_eraser(torch.compile(transformer, backend="eager"), tmp_path)
    plain = tiny_transformer(num_layers=1)
    load_eraser(torch.compile(plain, backend="eager"), tmp_path)
    assert torch.equal(run(plain), run(transformer))
