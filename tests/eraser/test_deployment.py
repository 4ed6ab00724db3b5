"""What the guide says of deployment and its snippets do not show."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from diffusers_ext.eraser.adapter.outputs import erasers_disabled
from diffusers_ext.eraser.files import load_eraser, save_eraser
from tests.eraser.saved_erasers import run, saved_eraser
from tests.eraser.test_compatibility import draw
from tests.tiny_cogvideox import tiny_transformer, tiny_video_pipeline


def test_a_pipeline_for_each_thread_around_one_model(tmp_path):
    pipeline = tiny_video_pipeline()
    base = draw(pipeline)
    load_eraser(pipeline, saved_eraser(tmp_path))
    erased = draw(pipeline)

    def request(off: bool) -> torch.Tensor:
        own = type(pipeline).from_pipe(
            pipeline,
            scheduler=copy.deepcopy(pipeline.scheduler),
            tokenizer=copy.deepcopy(pipeline.tokenizer),  # a fast one keeps its padding as state
        )
        own.set_progress_bar_config(disable=True)
        if not off:
            return draw(own)
        with erasers_disabled(own.transformer):
            return draw(own)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(request, [True, False] * 3))
    assert all(torch.equal(video, base) for video in found[::2])
    assert all(torch.equal(video, erased) for video in found[1::2])


def test_quantised_by_quanto_after_loading(tmp_path):
    quanto = pytest.importorskip("optimum.quanto")
    transformer = tiny_transformer()
    load_eraser(transformer, saved_eraser(tmp_path / "eraser"))
    expected = run(transformer)
    quanto.quantize(transformer, weights=quanto.qint8)
    quanto.freeze(transformer)
    torch.testing.assert_close(run(transformer), expected, atol=0.1, rtol=0)
    with pytest.raises(ValueError, match="as after layerwise casting or a quantisation"):
        save_eraser(transformer, tmp_path / "again")
