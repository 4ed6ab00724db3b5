"""Erasers under `torch.compile`: one graph, also after the scale changed."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from diffusers_ext.eraser.loading import load_eraser
from tests.eraser.saved_erasers import run, saved_eraser
from tests.tiny_cogvideox import tiny_transformer


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_one_graph_for_every_scale(tmp_path, fresh_compiler):
    saved_eraser(tmp_path)
    transformer = tiny_transformer()
    load_eraser(transformer, tmp_path, adapter_name="seven")
    plain = {}
    for scale in (1.0, 0.5, 0.0, 1.3):
        transformer.set_adapters("seven", scale)
        plain[scale] = run(transformer)
    counter = CompileCounter()
    compiled = torch.compile(transformer, backend=counter, fullgraph=True)
    for scale, expected in plain.items():
        compiled.set_adapters("seven", scale)
        torch.testing.assert_close(run(compiled), expected)
    assert counter.frame_count == 1
    load_eraser(compiled, tmp_path, adapter_name="again", scale=-1.3)
    torch.testing.assert_close(run(compiled), plain[0.0], atol=1e-4, rtol=0)
