"""Optimizers by name, and how a model is laid out and compiled for training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch.utils.data import TensorDataset

from diffusers_ext.core import settings as core_settings
from diffusers_ext.core.settings import OPTIMIZERS, TrainingSettings
from diffusers_ext.training.run.checkpoints import Checkpoints
from diffusers_ext.training.run.loop import LoopSettings, TrainingLoop
from diffusers_ext.training.run.optimizers import make_optimizer, make_schedule, set_memory_format
from diffusers_ext.training.run.setup import make_accelerator
from tests.training import stub_optimizers
from tests.training.noise_runs import noise_line, script_of, train
from tests.training.noise_sets import write_noises
from tests.training.test_training_options import difference

pytestmark = pytest.mark.usefixtures("fresh_accelerator")
WEIGHTS = "diffusion_pytorch_model.safetensors"
STAND_IN = ("tests", "training.stub_optimizers.AveragedSGD")


@pytest.fixture(params=["stand-in", "schedulefree"])
def schedule_free(request, monkeypatch) -> None:
    """Schedule-Free, or what stands for it where the package is not installed."""
    if request.param == "stand-in":
        assert stub_optimizers.AveragedSGD
        monkeypatch.setitem(OPTIMIZERS, "schedule_free", STAND_IN)
    else:
        pytest.importorskip("schedulefree")


@pytest.fixture(scope="module")
def noises(tmp_path_factory) -> Path:
    return write_noises(tmp_path_factory.mktemp("noises") / "set", facts={})


def settings_of(**arguments) -> TrainingSettings:
    return TrainingSettings(**{"learning_rate": 0.1, "lr_scheduler": "constant", **arguments})


def test_every_name_makes_its_optimizer(monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "schedule_free", STAND_IN)
    monkeypatch.setitem(OPTIMIZERS, "prodigy", ("torch", "optim.RAdam"))
    monkeypatch.setitem(OPTIMIZERS, "adamw_8bit", ("torch", "optim.Adam"))
    classes = {
        "adamw": torch.optim.AdamW, "adamw_fused": torch.optim.AdamW, "adamw_8bit": torch.optim.Adam,
        "prodigy": torch.optim.RAdam, "schedule_free": stub_optimizers.AveragedSGD,
    }  # fmt: skip
    assert classes.keys() == OPTIMIZERS.keys()
    for name, kind in classes.items():
        settings = settings_of(optimizer=name, lr_scheduler="constant_with_warmup", lr_warmup_steps=3)
        optimizer = make_optimizer(settings, [torch.nn.Parameter(torch.ones(2))])
        assert type(optimizer) is kind
        group = optimizer.param_groups[0]
        assert group["lr"] == 0.1
        assert bool(group.get("fused")) == (name == "adamw_fused")
        make_schedule(settings, optimizer)
        # The one that averages warms up by itself.
        assert (group.get("warmup_steps"), group["lr"]) == ((3, 0.1) if name == "schedule_free" else (None, 0.0))


def test_fused_steps_are_those_of_adamw():
    found = {}
    for name in ("adamw", "adamw_fused"):
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 7))
        optimizer = make_optimizer(settings_of(optimizer=name, adam_weight_decay=0.1), [weight])
        for _ in range(3):
            (weight**3).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        found[name] = weight.detach()
    torch.testing.assert_close(found["adamw_fused"], found["adamw"])


@pytest.mark.parametrize("name", ["adamw_8bit", "prodigy", "schedule_free"])
def test_a_missing_package_is_refused_by_name(name, monkeypatch):
    monkeypatch.setattr(core_settings, "find_spec", lambda package: None)
    package = OPTIMIZERS[name][0]
    message = (
        f"`optimizer` must have its package {package}, got '{name}' without it. Install it .`pip install {package}`"
    )
    with pytest.raises(ValueError, match=message):
        settings_of(optimizer=name)


def test_what_does_not_go_together(monkeypatch, subject_line, noises, tmp_path, capsys):
    from diffusers_ext.training.nullspace.run import parse_args

    monkeypatch.setitem(OPTIMIZERS, "schedule_free", STAND_IN)
    monkeypatch.setitem(OPTIMIZERS, "prodigy", ("torch", "optim.RAdam"))
    for arguments, message in (
        ({"optimizer": "prodigy", "learning_rate": 1e-3}, "`learning_rate` must be near 1 with `optimizer` prodigy"),
        ({"optimizer": "schedule_free", "lr_scheduler": "cosine"}, "`lr_scheduler` must be constant or constant_with"),
        ({"optimizer": "adam"}, "`optimizer` must be one of .* Did you mean 'adamw'"),
    ):
        with pytest.raises(ValueError, match=message):
            settings_of(**arguments)
    with pytest.raises(
        ValueError, match="`optimizer` must be one of AdamW's with `--full_finetune`, got 'schedule_fr"
    ):
        parse_args(subject_line(optimizer="schedule_free", full_finetune=True, features=["k"]))
    line = noise_line("golden_noise_model", noises, tmp_path, optimizer="schedule_free", use_ema=True)
    with pytest.raises(ValueError, match="`use_ema` must be left out with `optimizer` schedule_free"):
        script_of("golden_noise_model").parse_args(line)


@pytest.mark.usefixtures("schedule_free")
def test_averaged_weights_are_what_is_saved_and_validated(tmp_path):
    """Gradients are taken at others; the result is their average."""
    seen: dict[str, list[torch.Tensor]] = {"trained": [], "shown": []}
    model = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.ones_(model.weight)

    def loss(module, batch, generator):
        seen["trained"].append(model.weight.detach().clone())
        return {"loss": (module(batch[0]) - 3).square().mean()}

    settings = settings_of(optimizer="schedule_free", max_train_steps=6)
    optimizer = make_optimizer(settings, model.parameters())
    accelerator = Accelerator(cpu=True)
    checkpoints = Checkpoints(accelerator, tmp_path, {}, every=2)
    loop = TrainingLoop(
        accelerator,
        model,
        optimizer,
        TensorDataset(torch.eye(2)),
        loss,
        LoopSettings(6, logging_steps=1),
        make_schedule(settings, optimizer),
        checkpoints=checkpoints,
        callbacks=[(3, lambda step: seen["shown"].append(model.weight.detach().clone()))],
    )
    loop.run()
    assert len(seen["trained"]) == 6
    at_the_end = model.weight.detach().clone()
    assert torch.equal(seen["shown"][-1], at_the_end)
    assert torch.equal(load_file(tmp_path / "checkpoint-6/trained_0.safetensors")["weight"], at_the_end)
    assert not torch.equal(seen["shown"][0], seen["trained"][3])  # after three steps
    optimizer.train()
    assert not torch.equal(model.weight, at_the_end)


@pytest.mark.usefixtures("schedule_free")
def test_a_resumed_run_goes_on_to_the_same_bits(noises, tmp_path):
    usual = {"optimizer": "schedule_free", "checkpointing_steps": 2, "validation_steps": 2, "logging_steps": 1}
    whole = train("golden_noise_model", noises, tmp_path / "whole", **usual)
    shutil.copytree(whole / "checkpoint-2", tmp_path / "again/checkpoint-2")
    again = train("golden_noise_model", noises, tmp_path / "again", **usual, resume_from_checkpoint="latest")
    assert (again / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    histories = [json.loads((folder / "training_report.json").read_text()) for folder in (whole, again)]
    assert histories[0]["history"] == histories[1]["history"]
    assert histories[0]["validation"] == histories[1]["validation"]
    with pytest.raises(ValueError, match="`optimizer` must be the same"):
        train("golden_noise_model", noises, tmp_path / "again", checkpointing_steps=2, resume_from_checkpoint="latest")


def test_prodigy_trains_and_goes_on_to_the_same_bits(noises, tmp_path):
    pytest.importorskip("prodigyopt")
    usual = {"optimizer": "prodigy", "learning_rate": 1, "checkpointing_steps": 2}
    whole = train("golden_noise_model", noises, tmp_path / "whole", **usual)
    shutil.copytree(whole / "checkpoint-2", tmp_path / "again/checkpoint-2")
    again = train("golden_noise_model", noises, tmp_path / "again", **usual, resume_from_checkpoint="latest")
    assert (again / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()


def test_channels_last_changes_the_rounding_alone(teach, noises):
    assert difference(teach("usual"), teach("last", channels_last=True)) < 1e-3
    unet = torch.nn.Conv2d(4, 8, 3)
    set_memory_format(settings_of(channels_last=True), unet)
    assert unet.weight.is_contiguous(memory_format=torch.channels_last)


def test_files_have_channels_where_they_always_were(tmp_path):
    sequences = write_noises(tmp_path / "set", 3, facts={})
    usual = {"dropout": 0.0, "adam_epsilon": 1e-3}
    folders = [train("rnn", sequences, tmp_path / str(last), channels_last=last, **usual) for last in (None, True)]
    first, second = (load_file(folder / WEIGHTS) for folder in folders)
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, atol=1e-4, rtol=1e-3)


def test_a_transformer_has_no_channels_to_put_last(noises, tmp_path):
    with pytest.raises(ValueError, match="`channels_last` must be left out for a GoldenNoiseModel"):
        train("golden_noise_model", noises, tmp_path / "out", channels_last=True)
    assert not (tmp_path / "out").exists()


def test_compiling_is_a_flag_and_the_backend_accelerates(noises, tmp_path, monkeypatch):
    line = noise_line("golden_noise_model", noises, tmp_path / "compiled", compile_model=True)
    settings = script_of("golden_noise_model").parse_args(line)
    assert make_accelerator(settings).state.dynamo_plugin.backend.value == "INDUCTOR"
    usual = train("golden_noise_model", noises, tmp_path / "usual")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    compiled = train("golden_noise_model", noises, tmp_path / "compiled", compile_model=True)
    first, second = (load_file(folder / WEIGHTS) for folder in (usual, compiled))
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, atol=1e-5, rtol=1e-4)


def test_pages_are_locked_for_a_gpu_alone(noises, tmp_path):
    """On the CPU, where torch would warn, nothing is pinned."""
    folders = [
        train("golden_noise_model", noises, tmp_path / str(pinned), dataloader_pin_memory=pinned)
        for pinned in (None, True)
    ]
    assert (folders[0] / WEIGHTS).read_bytes() == (folders[1] / WEIGHTS).read_bytes()
