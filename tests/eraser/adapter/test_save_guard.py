"""An eraser does not vanish when its transformer or pipeline is saved."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from peft import get_peft_model

from diffusers_ext.eraser.adapter.config import EraserConfig
from diffusers_ext.eraser.files import load_eraser, save_eraser
from tests.eraser.saved_erasers import make_eraser, run, saved_eraser
from tests.tiny_cogvideox import tiny_transformer, tiny_video_pipeline

REFUSED = r"must not lose erasers, got a CogVideoX.* with \['dog'\].*`save_eraser\(transformer"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved_eraser(tmp_path_factory.mktemp("eraser"))


def test_an_eraser_survives_saving_the_pipeline_or_saving_refuses(folder, tmp_path):
    pipeline = tiny_video_pipeline()
    base, before = run(pipeline.transformer), set(vars(pipeline.transformer))
    load_eraser(pipeline, folder, adapter_name="dog")
    erased = run(pipeline.transformer)
    for saver in (pipeline, pipeline.transformer, type(pipeline).from_pipe(pipeline)):
        with pytest.raises(ValueError, match=REFUSED):
            saver.save_pretrained(tmp_path / "pipeline")
    assert not (tmp_path / "pipeline" / "model_index.json").exists()
    # What the message says.
    save_eraser(pipeline, tmp_path / "dog")
    pipeline.unload_lora_weights()
    gc.collect()
    assert set(vars(pipeline.transformer)) - before <= {"_hf_peft_config_loaded"}
    pipeline.save_pretrained(tmp_path / "pipeline")
    again = type(pipeline).from_pretrained(tmp_path / "pipeline")
    assert torch.equal(run(again.transformer), base)
    load_eraser(again, tmp_path / "dog")
    assert torch.equal(run(again.transformer), erased)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_guarded_by_itself(duplicate, tmp_path):
    transformer = make_eraser(tiny_transformer(), "dog")
    twin = duplicate(transformer)
    transformer.unload_lora()
    gc.collect()
    assert "save_pretrained" not in vars(transformer)
    with pytest.raises(ValueError, match=REFUSED):
        twin.save_pretrained(tmp_path)
    twin.delete_adapters("dog")
    twin.save_pretrained(tmp_path)
    assert "save_pretrained" not in vars(twin)
    assert torch.equal(run(type(twin).from_pretrained(tmp_path)), run(transformer))


def test_wrappers_are_guarded(tmp_path):
    transformer = make_eraser(tiny_transformer(num_layers=1), "dog")
    with pytest.raises(ValueError, match=REFUSED):
        torch.compile(transformer, backend="eager").save_pretrained(tmp_path)
    wrapped = get_peft_model(tiny_transformer(), EraserConfig(r=2), "dog")
    wrapped.save_pretrained(tmp_path)  # of PEFT: writes the eraser
    with pytest.raises(ValueError, match=REFUSED):
        wrapped.get_base_model().save_pretrained(tmp_path)


def test_the_guard_does_not_keep_the_model():
    transformer = make_eraser(tiny_transformer(), "dog")
    gone = weakref.ref(transformer)
    gc.disable()
    try:
        del transformer
        assert gone() is None
    finally:
        gc.enable()
