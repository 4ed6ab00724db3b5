from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file

from diffusers_ext import collect_statistics
from diffusers_ext.core.capture import capture
from diffusers_ext.families.lora_files import export_lora, read_lora
from diffusers_ext.nullspace.collect import encode_text
from diffusers_ext.nullspace.debleed import (
    debleed_lora,
    preserved_energy,
    relative_drift,
    subject_projections,
    uncovered_modules,
    with_text_encoders,
)
from diffusers_ext.nullspace.lora import instance_statistics_like, predicted_drift
from diffusers_ext.nullspace.pipeline import NullSpaceDreamBoothPipeline
from diffusers_ext.nullspace.projector import NullSpaceProjector, subject_projection
from diffusers_ext.nullspace.prompts import preserved_texts
from tests.nullspace.conftest import FEW_PROMPTS
from tests.tiny_digits import random_digits_pipeline
from tests.tiny_lora import add_random_lora
from tests.tiny_pipelines import sdxl_pipeline


def save_random_lora(folder: Path, targets: tuple[str, ...]) -> Path:
    unet = random_digits_pipeline().unet
    add_random_lora(unet, targets)
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=get_peft_model_state_dict(unet, adapter_name="default"),
        unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
    )
    return folder


@pytest.fixture(scope="module")
def text_lora(tmp_path_factory) -> Path:
    """A LoRA of scale 2 on K and V of cross-attention, the Linears of `few_statistics`."""
    return save_random_lora(tmp_path_factory.mktemp("lora"), ("attn2.to_k", "attn2.to_v"))


def draw(pipeline, prompt: str) -> torch.Tensor:
    return pipeline(prompt, num_inference_steps=2, output_type="pt", generator=torch.Generator().manual_seed(0)).images


@pytest.mark.parametrize("criterion", [{"energy": 0}, {"damping": 1e-3}, {"rank": 5}])
def test_every_a_is_projected_and_every_b_kept(few_statistics, text_lora, criterion):
    before = read_lora(text_lora)
    after = debleed_lora(text_lora, few_statistics, **criterion)
    projector = NullSpaceProjector.from_statistics(few_statistics, **criterion)
    given = debleed_lora(before, few_statistics, projector=projector)
    assert after.keys() == before.keys() == given.keys()
    for key, tensor in after.items():
        expected = before[key]
        if ".lora_A." in key:
            linear = key.removeprefix("unet.").removesuffix(".lora_A.weight")
            expected = (expected.double() @ projector.projection(linear)).float()
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-6)
        assert tensor.equal(given[key])


def test_dtypes_are_kept(few_statistics, text_lora):
    half = {key: tensor.half() for key, tensor in read_lora(text_lora).items()}
    after = debleed_lora(half, few_statistics, rank=3)
    assert {tensor.dtype for tensor in after.values()} == {torch.float16}


def test_pictures_equal_those_of_the_projection_at_run_time(few_statistics, text_lora, tmp_path):
    cut = {"energy": 1e-4}
    path = tmp_path / "debleeded.safetensors"
    debleed_lora(text_lora, few_statistics, output_path=path, **cut)
    stock, base = random_digits_pipeline(), random_digits_pipeline()
    stock.load_lora_weights(path)
    pipeline = NullSpaceDreamBoothPipeline(
        **random_digits_pipeline().components, statistics=few_statistics,
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(text_lora)
    for prompt in (*FEW_PROMPTS, "a photo of sks"):
        original, picture = draw(base, prompt), draw(pipeline, prompt)
        with pipeline.preserve(strength=1, **cut):
            projected = draw(pipeline, prompt)
        torch.testing.assert_close(draw(stock, prompt), projected, rtol=0, atol=1e-5)
        kept = (projected - original).abs().mean() / (picture - original).abs().mean()
        assert (kept > 0.05) if "sks" in prompt else (kept < 0.05)
        assert draw(pipeline, prompt).equal(picture)


def test_uncovered_modules_are_an_error_kept_or_dropped(few_statistics, tmp_path):
    lora = read_lora(save_random_lora(tmp_path, ("attn2.to_k", "attn2.to_q")))
    message = r"must cover every module of the LoRA, got none for 7, the first is 'unet.*to_q.lora_A"
    with pytest.raises(ValueError, match=message):
        debleed_lora(lora, few_statistics, rank=3, output_path=tmp_path / "no.safetensors")
    assert not (tmp_path / "no.safetensors").exists()
    kept = debleed_lora(lora, few_statistics, rank=3, uncovered="keep")
    dropped = debleed_lora(lora, few_statistics, rank=3, uncovered="drop")
    assert kept.keys() == lora.keys()
    assert dropped.keys() == {key for key in lora if "to_k" in key}
    for key, tensor in lora.items():
        changed = "to_k.lora_A" in key
        assert kept[key].equal(tensor) != changed
        assert changed == (key in dropped and not dropped[key].equal(tensor))


def test_text_encoder_loras_are_never_covered(few_statistics):
    name = few_statistics.linears[0]
    lora = {f"text_encoder.{name}.lora_{part}.weight": torch.ones(128, 128) for part in "AB"}
    with pytest.raises(ValueError, match="got none for 1, the first is 'text_encoder.down"):
        debleed_lora(lora, few_statistics, rank=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"uncovered": "skip", "rank": 3}, "`uncovered` must be 'error', 'keep' or 'drop', got 'sk"),
        ({}, "One of `instance_prompts`, `instance_statistics`, `projector` and one criterion must be"),
        ({"rank": 3, "energy": 0}, "Exactly one of"),
        ({"rank": 3, "output_path": "lora.bin"}, "`output_path` must end in .safetensors, got lora"),
    ],
)
def test_bad_arguments_are_refused(few_statistics, text_lora, arguments, message):
    with pytest.raises(ValueError, match=message):
        debleed_lora(text_lora, few_statistics, **arguments)


def test_projector_and_criterion_exclude_each_other(few_statistics, text_lora):
    projector = NullSpaceProjector.from_statistics(few_statistics, rank=3)
    with pytest.raises(ValueError, match="got none or several"):
        debleed_lora(text_lora, few_statistics, projector=projector, rank=3)


def test_loras_of_another_width_are_refused(few_statistics):
    name = few_statistics.linears[0]
    lora = {f"unet.{name}.lora_A.weight": torch.ones(2, 64), f"unet.{name}.lora_B.weight": torch.ones(56, 2)}
    with pytest.raises(ValueError, match=r"rows of width 128 .* got shape \(2, 64\)"):
        debleed_lora(lora, few_statistics, rank=3)


def test_nothing_left_is_an_error(few_statistics, tmp_path):
    lora = save_random_lora(tmp_path, ("attn2.to_q",))
    with pytest.raises(ValueError, match="must have an effect, got zero in every update"):
        debleed_lora(lora, few_statistics, rank=3, uncovered="drop")


def test_preserved_energy_is_the_predicted_drift_but_for_the_weights(text_lora, few_statistics):
    pipeline = random_digits_pipeline()
    pipeline.load_lora_weights(text_lora)
    energies = preserved_energy(text_lora, few_statistics)
    drifts = predicted_drift(pipeline.unet, few_statistics, "default_0")
    assert energies.keys() == drifts.keys()
    for name, drift in drifts.items():
        weight = pipeline.unet.get_submodule(name).get_base_layer().weight.detach().double()
        moment = few_statistics.moments[few_statistics.key(name)].mean
        own = ((weight @ moment) * weight).sum().item()
        assert energies[name] / own == pytest.approx(drift, rel=1e-4)


def test_preserved_energy_leaves_out_what_has_no_statistic(few_statistics, tmp_path):
    lora = save_random_lora(tmp_path, ("attn2.to_q", "attn2.to_k"))
    energies = preserved_energy(lora, few_statistics)
    assert len(energies) == 7
    assert all(name.endswith("to_k") and energy > 0 for name, energy in energies.items())


SUBJECT = ["a photo of the digit sks"]


def moments(seed: int = 0, dim: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """New and old vectors that share a direction, and an update."""
    generator = torch.Generator().manual_seed(seed)
    new, old, delta = (torch.randn(rows, dim, generator=generator, dtype=torch.float64) for rows in (2, 3, 4))
    new[0] += old[0]
    return new, old, delta


@pytest.mark.parametrize("strictness", [0.1, 1.0, 50.0])
def test_it_is_the_least_squares_solution(strictness):
    new, old, delta = moments()
    c_new, c_old = new.T @ new / len(new), old.T @ old / len(old)
    projected = (delta @ subject_projection(c_new, c_old, strictness)).requires_grad_(True)
    level = 1e-4 * c_old.diagonal().mean()
    loss = (
        ((projected - delta) @ new.T).square().sum() / len(new)
        + strictness * (projected @ old.T).square().sum() / len(old)
        + strictness * level * projected.square().sum()
    )
    loss.backward()
    assert projected.grad.abs().max() < 1e-12


def test_a_subject_with_a_direction_of_its_own_is_kept_and_the_rest_is_not_touched():
    new, old, delta = moments()
    c_new, c_old = new.T @ new / 2, old.T @ old / 3
    projection = subject_projection(c_new, c_old, strictness=1e4)
    # Three old and two new vectors of six numbers: nothing has to be given up.
    torch.testing.assert_close(delta @ projection @ new.T, delta @ new.T, atol=2, rtol=0.3)
    assert (delta @ projection @ old.T).norm() < 1e-2 * (delta @ old.T).norm()
    loose = subject_projection(c_new, c_old, strictness=1e-6)
    torch.testing.assert_close(delta @ loose @ new.T, delta @ new.T, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("strictness", [0.0, -1.0, float("inf"), float("nan")])
def test_strictness_must_be_positive(strictness):
    with pytest.raises(ValueError, match="`strictness` must be positive, got"):
        subject_projection(torch.eye(2), torch.eye(2), strictness)


def test_a_lora_keeps_its_subject_and_loses_the_rest(few_statistics, tmp_path):
    pipeline = random_digits_pipeline()
    lora = save_random_lora(tmp_path, ("attn2.to_k", "attn2.to_v"))
    subject = instance_statistics_like(pipeline, few_statistics, SUBJECT)
    strict = debleed_lora(lora, few_statistics, instance_statistics=subject, strictness=100.0)
    loose = debleed_lora(lora, few_statistics, instance_statistics=subject, strictness=1e-3)
    energies = [
        [sum(preserved_energy(tensors, read).values()) for tensors in (read_lora(lora), loose, strict)]
        for read in (subject, few_statistics)
    ]
    (_, loose_subject, strict_subject), (old, loose_old, strict_old) = energies
    assert loose_subject == pytest.approx(energies[0][0], rel=0.05)
    assert strict_old < loose_old < old
    # Per unit of what it still does on the subject, it does less on what is preserved.
    assert strict_old / strict_subject < 0.2 * old / energies[0][0]
    read = debleed_lora(lora, few_statistics, pipeline=pipeline, instance_prompts=SUBJECT, strictness=100.0)
    assert all(tensor.equal(strict[key]) for key, tensor in read.items())


def test_bad_input(few_statistics, tmp_path):
    pipeline = random_digits_pipeline()
    lora = save_random_lora(tmp_path, ("attn2.to_k", "attn2.to_v"))
    with pytest.raises(ValueError, match="`pipeline` must be given to read `instance_prompts`"):
        debleed_lora(lora, few_statistics, instance_prompts=SUBJECT)
    with pytest.raises(ValueError, match="must be given, got none or several"):
        debleed_lora(lora, few_statistics, pipeline=pipeline, instance_prompts=SUBJECT, damping=1.0)
    repeated = instance_statistics_like(pipeline, few_statistics, FEW_PROMPTS[:1])
    with pytest.raises(ValueError, match="An instance prompt must not be a preserved one"):
        subject_projections(few_statistics, repeated, 10.0)
    fewer = collect_statistics(pipeline, SUBJECT, features="k", show_progress=False)
    with pytest.raises(ValueError, match="Both statistics must cover the same Linears"):
        subject_projections(few_statistics, fewer, 10.0)


CLIP = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")


def text_encoder_lora(pipeline, components: tuple[str, ...], linears: tuple[str, ...] = CLIP) -> dict:
    """A LoRA of rank 2, as `read_lora` names it, on Linears of both layers of CLIP encoders and on K of the UNet."""
    generator = torch.Generator().manual_seed(0)
    lora = {}
    names = {
        f"{part}.text_model.{name.removeprefix('text_model.')}": module
        for part in components
        for name, module in getattr(pipeline, part).named_modules()
        if name.endswith(linears)
    }
    names |= {f"unet.{name}": module for name, module in pipeline.unet.named_modules() if name.endswith("attn2.to_k")}
    for name, linear in names.items():
        lora[f"{name}.lora_A.weight"] = torch.randn(2, linear.in_features, generator=generator) / 4
        lora[f"{name}.lora_B.weight"] = torch.randn(linear.out_features, 2, generator=generator) / 4
    return lora


@pytest.mark.parametrize("names", ["diffusers", "kohya"])
@pytest.mark.parametrize(
    ("build", "components", "linears"),
    [
        (random_digits_pipeline, ("text_encoder",), CLIP),
        (sdxl_pipeline, ("text_encoder", "text_encoder_2"), ("q_proj", "fc2")),  # others: two prompts fill them
    ],
)
def test_loras_of_text_encoders_keep_the_embeddings_of_preserved_prompts(tmp_path, build, components, linears, names):
    pipeline, preserved = build(), FEW_PROMPTS[:1]
    statistics = collect_statistics(pipeline, preserved, expand_sub_phrases=False)
    lora = text_encoder_lora(pipeline, components, linears)
    path = tmp_path / "lora.safetensors"
    export_lora(lora, names, path)
    assert any(key.startswith(("lora_te1_" if len(components) > 1 else "lora_te_",)) for key in load_file(path)) == (
        names == "kohya"
    )
    with pytest.raises(ValueError, match="`statistics` must cover every module of the LoRA"):
        debleed_lora(path, statistics, energy=0)
    quiet = debleed_lora(path, statistics, pipeline=pipeline, text_encoders=True, energy=0)
    assert quiet.keys() == lora.keys()
    kept, other = [*preserved, ""], ["a photo of sks"]
    base = encode_text(pipeline, kept), encode_text(pipeline, other)
    moved = []
    for tensors in (lora, quiet):
        adapted = build()
        adapted.load_lora_weights(dict(tensors))
        moved.append([(encode_text(adapted, p) - b).abs().max() / b.abs().max() for p, b in zip((kept, other), base)])
    assert moved[0][0] > 1e-2
    assert moved[1][0] < 1e-5
    assert moved[1][1] > 1e-3


def test_drift_of_text_encoders_is_told_and_falls():
    pipeline = random_digits_pipeline()
    statistics = collect_statistics(pipeline, FEW_PROMPTS)
    lora = text_encoder_lora(pipeline, ("text_encoder",))
    known = with_text_encoders(statistics, pipeline, lora)
    assert uncovered_modules(lora, known) == []
    assert uncovered_modules(lora, statistics) == [n for n in known.sources if n.startswith("text_encoder")]
    first = "text_encoder.text_model.encoder.layers.0"
    assert known.key(f"{first}.self_attn.q_proj") == known.key(f"{first}.self_attn.v_proj")
    assert len(known.moments) == 1 + 2 * 4
    seen = []
    with capture(pipeline.text_encoder, "*layers.0.mlp.fc2", lambda _, x: seen.append(x.flatten(0, 1).double())):
        texts = preserved_texts(FEW_PROMPTS)
        encode_text(pipeline, [*texts, *[""] * len(FEW_PROMPTS)])
    rows = torch.cat(seen)
    torch.testing.assert_close(known.moments[f"{first}.mlp.fc2"].mean, rows.T @ rows / len(rows), rtol=1e-5, atol=1e-9)
    quiet = debleed_lora(lora, statistics, pipeline=pipeline, text_encoders=True, damping=1e-3)
    before, after = (relative_drift(tensors, known, pipeline) for tensors in (lora, quiet))
    assert before.keys() == after.keys() == {*known.linears} & before.keys()
    assert all(after[name] < before[name] / 3 for name in before)
    (weight,) = (
        layer.weight.double()
        for name, layer in pipeline.text_encoder.named_modules()
        if name.endswith("encoder.layers.0.mlp.fc2")
    )
    delta = lora[f"{first}.mlp.fc2.lora_B.weight"].double() @ lora[f"{first}.mlp.fc2.lora_A.weight"].double()
    expected = (rows @ delta.T).square().sum() / (rows @ weight.T).square().sum()
    assert before[f"{first}.mlp.fc2"] == pytest.approx(expected.item(), rel=1e-4)


def test_the_subject_is_kept_in_text_encoders_too():
    pipeline = random_digits_pipeline()
    statistics = collect_statistics(pipeline, FEW_PROMPTS, expand_sub_phrases=False)
    lora = text_encoder_lora(pipeline, ("text_encoder",))
    ways = {"pipeline": pipeline, "text_encoders": True}
    kept = debleed_lora(lora, statistics, instance_prompts=["a photo of sks"], **ways)
    cut = debleed_lora(lora, statistics, energy=0, **ways)
    known = with_text_encoders(statistics, pipeline, lora)
    subject = with_text_encoders(instance_statistics_like(pipeline, statistics, ["a photo of sks"]), pipeline, lora)
    energies = [sum(preserved_energy(tensors, known).values()) for tensors in (lora, kept)]
    assert energies[1] < 0.05 * energies[0]
    on_subject = [sum(preserved_energy(tensors, subject).values()) for tensors in (lora, kept, cut)]
    assert 0.3 * on_subject[0] < on_subject[1]
    assert on_subject[2] < on_subject[1]


@pytest.mark.parametrize(
    ("name", "message"),
    [("text_encoder.nothing", "must change Linears that the base model has"), ("text_encoder_3.a", "lacks")],
)
def test_modules_that_text_encoders_lack_are_refused(few_statistics, digits, name, message):
    lora = {f"{name}.lora_{part}.weight": torch.ones(4, 4) for part in "AB"}
    with pytest.raises(ValueError, match=message):
        debleed_lora(lora, few_statistics, pipeline=digits, text_encoders=True, energy=0)
    with pytest.raises(ValueError, match="`pipeline` must be given with `text_encoders`, got None"):
        debleed_lora(lora, few_statistics, text_encoders=True, energy=0)
