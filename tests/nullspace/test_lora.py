from __future__ import annotations

import json

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from safetensors import safe_open

from diffusers_ext.core.second_moment import SecondMoment
from diffusers_ext.nullspace.collect import collect_statistics
from diffusers_ext.nullspace.directions import usual_null_space
from diffusers_ext.nullspace.lora import (
    add_null_space_lora,
    check_lora_config,
    instance_statistics_like,
    lora_delta,
    lora_linears,
    predicted_drift,
    preservation_penalty,
    save_lora,
)
from diffusers_ext.nullspace.projector import NullSpaceProjector
from diffusers_ext.nullspace.slots import find_linears
from diffusers_ext.nullspace.statistics import TEXT, FeatureStatistics
from tests.nullspace.conftest import FEW_PROMPTS
from tests.tiny_digits import random_digits_pipeline
from tests.tiny_pipelines import sdxl_pipeline

SUBJECT = ["a photo of sks"]


def train(unet: torch.nn.Module, steps: int = 4, penalty=None) -> None:
    """AdamW, weight decay included, towards noise for a fixed batch."""
    generator = torch.Generator().manual_seed(0)
    sample, target = torch.randn(2, 2, 4, 8, 8, generator=generator)
    text = torch.randn(2, 16, 128, generator=generator)
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=1e-2)
    for _ in range(steps):
        loss = (unet(sample, 500, text).sample - target).square().mean()
        if penalty is not None:
            loss = loss + penalty(unet)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def deltas(unet: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: lora_delta(layer).detach() for name, layer in lora_linears(unet)}


@pytest.mark.parametrize("directions", ["generalized", "null"])
def test_training_stays_in_the_frozen_directions(few_statistics, digits, directions):
    weights = {name: value.clone() for name, value in digits.unet.state_dict().items()}
    chosen = add_null_space_lora(
        digits.unet, few_statistics, instance_prompts=SUBJECT, pipeline=digits, rank=2,
        directions=directions,
    )  # fmt: skip
    assert chosen.kind == directions
    trained = {name for name, p in digits.unet.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.lora_B.default.weight" for name in few_statistics.linears}
    train(digits.unet)
    for name, layer in lora_linears(digits.unet):
        a, delta = chosen.vectors(name), lora_delta(layer).detach().double()
        assert layer.lora_A["default"].weight.equal(a.float())
        assert layer.scaling["default"] == 1
        span = torch.linalg.qr(a.T).Q
        torch.testing.assert_close(delta @ span @ span.T, delta, rtol=0, atol=1e-6 * delta.norm())
        assert delta.norm() > 0
    for name, value in digits.unet.state_dict().items():
        if "lora_" not in name:
            assert value.equal(weights[name.replace(".base_layer", "")])


def full_rank(statistics: FeatureStatistics, floor: float) -> FeatureStatistics:
    """The same statistics with a little energy everywhere, or as if summed in float32."""
    old = statistics.moments[TEXT]
    level = 1e-6 * old.total.diagonal().mean() if floor == 1e-12 else 0.0
    total = old.total + level * torch.eye(old.dim, dtype=torch.float64)
    moments = {TEXT: SecondMoment.from_total(total, old.count, floor)}
    return FeatureStatistics(moments, statistics.sources, statistics.facts)


@pytest.mark.parametrize("floor", [None, 1e-12, 1e-6])
def test_null_directions_are_exact_where_they_can_be_and_say_so(few_statistics, digits, floor):
    statistics = few_statistics if floor is None else full_rank(few_statistics, floor)
    arguments = {"instance_prompts": SUBJECT, "pipeline": digits, "directions": "null"}
    by_default = add_null_space_lora(digits.unet, statistics, **arguments)
    energy = 0 if floor is None else 1e-3
    cut = NullSpaceProjector.from_statistics(statistics, energy=energy)
    other = random_digits_pipeline().unet
    given = add_null_space_lora(other, statistics, **arguments, projector=cut)
    assert by_default.sets[TEXT].vectors.equal(given.sets[TEXT].vectors)
    told = "numerical null space, exact in float32" if floor is None else "least 0.001 of the energy"
    assert by_default.report()[0]["null_space"].startswith(told)
    assert "null_space" not in given.report()[0]


def test_a_null_space_without_the_subject_is_not_used(few_statistics, digits):
    subject = instance_statistics_like(digits, few_statistics, SUBJECT)
    old = few_statistics.moments[TEXT]
    values, vectors = few_statistics.spectrum(TEXT)
    basis = vectors[:, values <= 1e-12 * values[-1]]
    inside = basis @ basis.T
    outside = torch.eye(old.dim, dtype=torch.float64) - (1 - 1e-3) * inside
    total = outside @ subject.moments[TEXT].total @ outside  # 1e-6 of its energy is left inside
    moments = {TEXT: SecondMoment.from_total(total, subject.moments[TEXT].count, 1e-12)}
    few = FeatureStatistics(moments, subject.sources, subject.facts)
    assert usual_null_space(few_statistics, subject, 1)[1].startswith("numerical")
    assert usual_null_space(few_statistics, few, 1)[1].startswith("least 0.001")


def test_soft_training_is_held_back_by_the_penalty(few_statistics):
    moved = []
    for weight in (0, 1e5):
        unet = random_digits_pipeline().unet
        config = LoraConfig(init_lora_weights="gaussian")
        torch.manual_seed(1)
        assert add_null_space_lora(
            unet, few_statistics, directions="soft", rank=2, lora_config=config
        ) is None  # fmt: skip
        trained = {name.split(".")[-3] for name, p in unet.named_parameters() if p.requires_grad}
        assert trained == {"lora_A", "lora_B"}
        train(unet, penalty=lambda u, w=weight: w * preservation_penalty(u, few_statistics))
        moved.append(preservation_penalty(unet, few_statistics).item())
    assert 0 < moved[1] < 0.1 * moved[0]


def test_penalty_and_drift_are_relative_output_energies(few_statistics, digits):
    add_null_space_lora(digits.unet, few_statistics, directions="soft", rank=3)
    train(digits.unet, steps=2)
    drifts = predicted_drift(digits.unet, few_statistics)
    mean = few_statistics.moments[TEXT].mean
    for name, layer in lora_linears(digits.unet):
        delta, weight = lora_delta(layer).double(), layer.get_base_layer().weight.double()
        dense = (delta @ mean @ delta.T).trace() / (weight @ mean @ weight.T).trace()
        assert drifts[name] == pytest.approx(dense.item(), rel=1e-4)
    assert set(drifts) == set(few_statistics.linears)
    penalty = preservation_penalty(digits.unet, few_statistics)
    assert penalty.item() == pytest.approx(sum(drifts.values()) / 14, rel=1e-5)
    assert penalty.dtype == torch.float32
    with pytest.raises(ValueError, match="`model` must carry the LoRA 'other', got none"):
        predicted_drift(digits.unet, few_statistics, "other")


def test_statistics_of_the_subject_repeat_the_settings(digits):
    run = {"num_inference_steps": 2, "guidance_scale": 2.0, "seed": 3, "layers": [2]}
    statistics = collect_statistics(digits, FEW_PROMPTS, features=("q", "k"), expand_sub_phrases=False, **run)
    subject = instance_statistics_like(digits, statistics, SUBJECT)
    assert subject.sources == statistics.sources
    assert subject.facts["settings"] == {**statistics.facts["settings"], "include_guidance_prompts": False}
    chosen = add_null_space_lora(digits.unet, statistics, instance_statistics=subject)
    assert set(chosen.sets) == set(statistics.moments)
    statistics.facts["settings"] = {"imported_from_layout": True}
    with pytest.raises(ValueError, match="`statistics` must tell how they were collected, got imp"):
        instance_statistics_like(digits, statistics, SUBJECT)


def bad_arguments() -> list[tuple[dict, str]]:
    dora = LoraConfig(use_dora=True)
    return [
        ({"directions": "hard"}, r"`directions` must be one of \('generalized', .*, got 'hard'"),
        ({"rank": 0}, "`rank` must be at least 1, got 0"),
        ({"rank": 40}, "`rank` must be at most 1?[0-9], the directions"),
        ({"lora_config": dora}, "`use_dora` must be False, got True"),
        ({"lora_config": LoraConfig(bias="all")}, "`bias` must be 'none', got 'all'"),
        ({"instance_prompts": None}, "`instance_prompts` with `pipeline`, or .* got neither"),
        ({"pipeline": None}, "`instance_prompts` with `pipeline`, or .* got neither"),
        ({"instance_prompts": []}, "`instance_prompts` must be a non-empty list of strings"),
        ({"instance_prompts": "sks"}, "`instance_prompts` must be a list of prompts, got the str"),
        ({"instance_prompts": FEW_PROMPTS}, "must not be a preserved one"),
        ({"instance_prompts": ["sks " * 15]}, r"must fit the tokenizer \(16 tokens\)"),
        ({"pipeline": random_digits_pipeline(1)}, "must be of the same text_encoder, got another"),
        ({"unet": sdxl_pipeline().unet}, "must be of this model, got some of 'down_blocks.0"),
    ]


@pytest.mark.parametrize(("change", "message"), bad_arguments())
def test_bad_arguments_are_refused_and_leave_the_unet_alone(few_statistics, digits, change, message):
    arguments = {"instance_prompts": SUBJECT, "pipeline": digits, "unet": digits.unet}
    with pytest.raises(ValueError, match=message):
        add_null_space_lora(statistics=few_statistics, **{**arguments, **change})
    assert not hasattr(digits.unet, "peft_config")
    assert all(parameter.requires_grad for parameter in digits.unet.parameters())


def test_another_denoiser_than_the_measured_one_is_refused(digits):
    run = {"num_inference_steps": 1, "layers": [0], "expand_sub_phrases": False}
    statistics = collect_statistics(digits, FEW_PROMPTS, features="q", **run)
    other = random_digits_pipeline(1).unet
    with pytest.raises(ValueError, match="must be of the same denoiser, got another one"):
        add_null_space_lora(other, statistics, directions="soft")


def test_another_pipeline_is_refused_before_the_subject_is_measured(few_statistics, digits):
    other = random_digits_pipeline(1)
    other.text_encoder.forward = None
    with pytest.raises(ValueError, match="must be of the same text_encoder, got another one"):
        add_null_space_lora(digits.unet, few_statistics, instance_prompts=SUBJECT, pipeline=other)


def test_statistics_of_another_width_are_refused(few_statistics, digits):
    wide = few_statistics.linears[0]
    narrow = FeatureStatistics(
        {TEXT: few_statistics.moments[TEXT], "q": few_statistics.moments[TEXT]},
        {wide: TEXT, wide.replace("to_k", "to_q"): "q"},
        few_statistics.facts,
    )
    with pytest.raises(ValueError, match="to_q' must have the model's width 56, got 128"):
        add_null_space_lora(digits.unet, narrow, directions="soft")


def test_adapters_get_along_by_name_and_the_callers_config_stays(few_statistics, digits):
    config = LoraConfig(r=5, lora_dropout=0.25, target_modules=["to_q"])
    before = config.to_dict()
    arguments = {"instance_prompts": SUBJECT, "pipeline": digits, "lora_config": config}
    add_null_space_lora(digits.unet, few_statistics, adapter_name="first", **arguments)
    assert config.to_dict() == before
    assert digits.unet.peft_config["first"].lora_dropout == 0.25
    with pytest.raises(ValueError, match="`adapter_name` must be new to the UNet, got 'first'"):
        add_null_space_lora(digits.unet, few_statistics, adapter_name="first", **arguments)
    arguments.update(adapter_name="second", rank=2)
    with pytest.warns(UserWarning, match="Already found a `peft_config`"):
        add_null_space_lora(digits.unet, few_statistics, **arguments)
    layers = [layer for _, layer in lora_linears(digits.unet, "first")]
    assert [layer.r for layer in layers] == [{"first": 1, "second": 2}] * 14


def test_half_precision_models_get_float32_loras(few_statistics, digits):
    digits.unet.to(torch.bfloat16)
    subject = instance_statistics_like(digits, few_statistics, SUBJECT)
    add_null_space_lora(digits.unet, few_statistics, instance_statistics=subject)
    dtypes = {p.dtype for name, p in digits.unet.named_parameters() if "lora_" in name}
    assert dtypes == {torch.float32}


def test_saved_loras_are_ordinary_files(few_statistics, digits, tmp_path):
    add_null_space_lora(digits.unet, few_statistics, instance_prompts=SUBJECT, pipeline=digits)
    with pytest.raises(ValueError, match="must have an effect, got all B matrices zero. Train it"):
        save_lora(StableDiffusionPipeline, digits.unet, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
    train(digits.unet)
    save_lora(StableDiffusionPipeline, digits.unet, tmp_path / "lora")
    other, path = sorted((tmp_path / "lora").iterdir())
    assert other.name == "comfyui_a1111_kohya.safetensors"
    assert path.name == "pytorch_lora_weights.safetensors"
    with safe_open(path, "pt") as handle:
        names = {name.rsplit(".lora", 1)[0] for name in handle.keys()}
        metadata = json.loads(handle.metadata()["lora_adapter_metadata"])
    assert names == {f"unet.{name}" for name in find_linears(digits.unet, ("k", "v"))}
    assert metadata["unet.target_modules"] == few_statistics.linears
    assert (metadata["unet.r"], metadata["unet.lora_alpha"]) == (1, 1)


def test_loras_that_are_not_finite_are_not_saved(few_statistics, digits, tmp_path):
    add_null_space_lora(digits.unet, few_statistics, instance_prompts=SUBJECT, pipeline=digits)
    name, layer = lora_linears(digits.unet)[3]
    with torch.no_grad():
        layer.lora_B["default"].weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=rf"must be finite, got B of '{name}', which is not"):
        save_lora(StableDiffusionPipeline, digits.unet, tmp_path)


@pytest.mark.parametrize(
    "options",
    [{}, {"lora_dropout": 0.1, "r": 3}, {"init_lora_weights": "gaussian", "lora_alpha": 7},
     {"target_modules": ["to_k"], "exclude_modules": ["up"], "init_lora_weights": False}],
)  # fmt: skip
def test_options_that_only_shape_a_and_b_pass(options):
    check_lora_config(LoraConfig(**options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "`use_dora` must be False, got True: DoRA rescales"),
        ({"bias": "lora_only"}, "`bias` must be 'none', got 'lora_only': a bias acts on every"),
        ({"lora_bias": True}, "`lora_bias` must be left at False, got True"),
        ({"init_lora_weights": "pissa"}, "must be True, False or 'gaussian', got 'pissa'"),
        ({"init_lora_weights": "olora"}, "must be True, False or 'gaussian', got 'olora'"),
        ({"modules_to_save": ["conv_in"]}, "`modules_to_save` must be left at None, got .*conv_in"),
        ({"rank_pattern": {"to_k": 2}}, r"`rank_pattern` must be left at \{\}, got \{'to_k': 2\}"),
        ({"alpha_pattern": {"to_k": 2}}, r"`alpha_pattern` must be left at \{\}, got"),
        ({"fan_in_fan_out": True}, "`fan_in_fan_out` must be left at False, got True"),
    ],
)
def test_options_that_break_preservation_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        check_lora_config(LoraConfig(**options))
