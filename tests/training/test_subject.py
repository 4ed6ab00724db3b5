from __future__ import annotations

import argparse
import json

import pytest
import torch

from diffusers_ext.nullspace.collect import collect_statistics
from diffusers_ext.nullspace.lora import lora_linears, preservation_penalty
from diffusers_ext.training.nullspace import subject
from diffusers_ext.training.nullspace.run import parse_args
from diffusers_ext.training.nullspace.subject import (
    SoftLoss,
    add_lora,
    free_constrained_weights,
    keep_rule,
    null_space_cut,
    prepare_weights,
    save_result,
)
from examples.digits.check_model import load_pipeline
from tests.tiny_digits import random_digits_pipeline
from tests.training.conftest import KNOWN
from tests.training.script_runs import files_below


@pytest.fixture
def pipeline():
    loaded = load_pipeline()
    loaded.unet.requires_grad_(False)
    return loaded


@pytest.fixture(scope="module")
def statistics():
    return collect_statistics(load_pipeline(), KNOWN, show_progress=False)


@pytest.fixture
def make_args(subject_line):
    def make(**arguments) -> argparse.Namespace:
        return parse_args(subject_line(**arguments))

    return make


def trainable(model) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_the_cut_is_by_energy_or_by_threshold(make_args, statistics):
    values = statistics.spectrum("text").values
    cuts = {
        "default": null_space_cut(make_args(), statistics),
        "energy": null_space_cut(make_args(null_energy=0.01), statistics),
        "threshold": null_space_cut(make_args(nullspace_threshold=1e-2), statistics),
        "both": null_space_cut(make_args(null_energy=0.01, nullspace_threshold=1e-2), statistics),
    }
    found = {name: cut.cuts["text"].dimensions for name, cut in cuts.items()}
    share = values.cumsum(0) / values.sum()
    assert found["default"] == int((share <= 1e-3).sum())
    assert found["energy"] == found["both"] == int((share <= 0.01).sum())
    assert found["threshold"] == int((values < 1e-2).sum())


@pytest.mark.parametrize("directions", ["generalized", "null", "soft", "plain"])
def test_what_trains_of_a_lora(make_args, pipeline, statistics, directions):
    args = make_args(directions=directions, rank=2, lora_dropout=0.25)
    report = add_lora(args, pipeline, None if directions == "plain" else statistics)
    layers = lora_linears(pipeline.unet)
    assert len(layers) == 14
    frozen = directions in ("generalized", "null")
    parts = {name.split(".lora_")[1][0] for name in trainable(pipeline.unet)}
    assert parts == ({"B"} if frozen else {"A", "B"})
    for _, layer in layers:
        assert layer.lora_A["default"].weight.shape == (2, 128)
        assert layer.lora_A["default"].weight.dtype == torch.float32
        assert not layer.lora_B["default"].weight.any()
        assert layer.scaling["default"] == 1
        assert layer.lora_dropout["default"].p == 0.25
    assert bool(report) == frozen


def test_a_plain_lora_takes_the_asked_layers_in_a_fixed_order(make_args, pipeline):
    args = make_args(directions="plain", features=["q", "out"], cross_attention_layers=[3, 1])
    add_lora(args, pipeline, None)
    names = [name for name, _ in lora_linears(pipeline.unet)]
    assert len(names) == 4
    assert {name.rsplit(".attn2.")[1] for name in names} == {"to_q", "to_out.0"}
    assert pipeline.unet.peft_config["default"].target_modules == names


def test_freed_weights_are_those_with_statistics(make_args, pipeline, statistics):
    pipeline.unet.to(torch.bfloat16)
    prepared = prepare_weights(make_args(full_finetune=True), pipeline, statistics)
    names = trainable(pipeline.unet)
    assert names == {f"{linear}.weight" for linear in statistics.linears}
    weights = dict(pipeline.unet.named_parameters())
    assert prepared.projections.keys() == {weights[name] for name in names}
    assert all(weights[name].dtype == torch.float32 for name in names)
    assert len({id(projection) for projection in prepared.projections.values()}) == 1
    assert prepared.report == []
    assert weights["conv_in.weight"].dtype == torch.bfloat16


def test_freed_weights_are_of_the_measured_model(make_args, pipeline):
    other = random_digits_pipeline()
    other.text_encoder = pipeline.text_encoder
    statistics = collect_statistics(other, KNOWN, features="q", num_inference_steps=1, show_progress=False)
    with pytest.raises(ValueError, match="must be of the same denoiser"):
        free_constrained_weights(make_args(full_finetune=True), pipeline.unet, statistics)
    assert not trainable(pipeline.unet)


@pytest.mark.parametrize("full", [None, True])
def test_checkpoints_keep_the_lora_or_the_weights(make_args, full):
    keep = keep_rule(make_args(full_finetune=full))
    frozen, free = (torch.nn.Parameter(torch.zeros(1), requires_grad=flag) for flag in (False, True))
    # A LoRA's frozen A belongs to the checkpoint: it decides what B means.
    assert keep("to_k.lora_A.default.weight", frozen) == (full is None)
    assert keep("to_k.weight", free) == bool(full)
    assert not keep("to_k.weight", frozen)


def test_the_price_of_drift_is_added_to_the_loss(make_args, pipeline, statistics, fresh_accelerator):
    add_lora(make_args(directions="soft"), pipeline, statistics)
    for _, layer in lora_linears(pipeline.unet):
        torch.nn.init.constant_(layer.lora_B["default"].weight, 0.1)
    loss = SoftLoss(lambda model, batch, generator: {"loss": torch.tensor(2.0)}, statistics, 10.0)
    found = loss(pipeline.unet, [], torch.Generator())
    penalty = preservation_penalty(pipeline.unet, statistics)
    assert found["preservation"] == penalty > 0
    torch.testing.assert_close(found["loss"], 2.0 + 10.0 * penalty)
    found["loss"].backward()
    assert all(layer.lora_B["default"].weight.grad.any() for _, layer in lora_linears(pipeline.unet))


def test_a_result_is_written_whole_or_not_at_all(make_args, pipeline, statistics, tmp_path, monkeypatch):
    args = make_args()
    add_lora(args, pipeline, statistics)
    with pytest.raises(ValueError, match="must have an effect, got all B matrices zero"):
        save_result(args, pipeline, statistics, {})
    assert not (tmp_path / "out").exists()
    for _, layer in lora_linears(pipeline.unet):
        torch.nn.init.ones_(layer.lora_B["default"].weight)
    save_result(args, pipeline, statistics, {"run": 1})
    before = {name: (tmp_path / "out" / name).read_bytes() for name in files_below(tmp_path / "out")}
    assert before.keys() == {
        "comfyui_a1111_kohya.safetensors", "pytorch_lora_weights.safetensors",
        "training_report.json", "statistics/config.json",
        "statistics/model.safetensors",
    }  # fmt: skip
    report = json.loads(before["training_report.json"])
    assert report["run"] == 1
    assert report["predicted_drift"].keys() == set(statistics.linears)

    def fail(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(subject, "predicted_drift", fail)
    with pytest.raises(OSError, match="No space left"):
        save_result(args, pipeline, statistics, {"run": 2})
    after = {name: (tmp_path / "out" / name).read_bytes() for name in files_below(tmp_path / "out")}
    assert after == before
