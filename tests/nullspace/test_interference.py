"""Several LoRAs at once: what is told of them without a picture, and what they then do."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import StableDiffusionPipeline

from diffusers_ext.nullspace.debleed import debleed_lora, relative_drift
from diffusers_ext.nullspace.interference import (
    TOGETHER,
    InterferenceReport,
    interference_report,
    loaded_lora,
    principal_cosines,
    update_products,
)
from diffusers_ext.nullspace.lora import instance_statistics_like
from diffusers_ext.nullspace.statistics import TEXT
from tests.nullspace.conftest import FEW_PROMPTS
from tests.tiny_digits import random_digits_pipeline

two_adapters = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
SUBJECTS = {"dog": ["a photo of sks"], "cat": ["the number nine"]}


def lora_along(linears: list[str], a: torch.Tensor, seed: int = 0, scale: float = 0.1) -> dict[str, torch.Tensor]:
    """The same A for K and V of the digits model, and random B."""
    generator, unet = torch.Generator().manual_seed(seed), random_digits_pipeline().unet
    lora = {}
    for name in linears:
        width = unet.get_submodule(name).out_features
        lora[f"unet.{name}.lora_A.weight"] = a.float()
        lora[f"unet.{name}.lora_B.weight"] = scale * torch.randn(width, len(a), generator=generator)
    return lora


def draw(rows: int, dim: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_angles_are_those_of_what_the_updates_read():
    one, two, three = torch.eye(3, dtype=torch.float64)
    b, metric = draw(5, 2, 0), torch.eye(3, dtype=torch.float64)
    turned = math.cos(0.5) * one + math.sin(0.5) * two
    assert principal_cosines((one[None], b[:, :1]), (turned[None], b[:, 1:]), metric).item() == pytest.approx(
        math.cos(0.5)
    )
    both = principal_cosines((torch.stack([one, two]), b), (torch.stack([two, three]), b), metric)
    assert both.tolist() == pytest.approx([1, 0], abs=1e-9)
    unused = torch.stack([b[:, 0], torch.zeros(5)], 1)  # of the second row of A
    assert principal_cosines((torch.stack([one, two]), unused), (two[None], b[:, :1]), metric).tolist() == [0]
    # Where inputs lie along one direction alone, all read the same.
    assert principal_cosines((one[None], b[:, :1]), (turned[None], b[:, 1:]), one.outer(one)).item() == pytest.approx(
        1
    )


def test_products_are_those_of_the_whole_updates():
    updates = [(draw(rank, 4, rank), draw(3, rank, 7 + rank)) for rank in (1, 2)]
    inputs = draw(10, 4, 9)
    outputs = torch.stack([inputs @ a.T @ b.T for a, b in updates]).flatten(1)
    found = update_products(updates, inputs.T @ inputs)
    assert torch.allclose(found, outputs @ outputs.T)


@pytest.fixture(scope="module")
def moment(few_statistics) -> torch.Tensor:
    """Of all that a report of `SUBJECTS` reads."""
    pipeline = random_digits_pipeline()
    read = [
        few_statistics,
        *(instance_statistics_like(pipeline, few_statistics, found) for found in SUBJECTS.values()),
    ]
    return sum(found.moments[TEXT].mean for found in read) / len(read)


def test_a_shared_direction_is_told_from_orthogonal_ones(few_statistics, moment):
    first, second = draw(1, 128, 0), draw(1, 128, 1)
    apart = second - (second @ moment @ first.T) / (first @ moment @ first.T) * first
    found = {}
    for name, rows in (("shared", 2 * first), ("apart", apart)):
        loras = {"dog": lora_along(few_statistics.linears, first), "cat": lora_along(few_statistics.linears, rows, 5)}
        (found[name],) = interference_report(random_digits_pipeline(), loras, few_statistics, SUBJECTS).pairs
    assert (found["shared"]["overlap"], found["apart"]["overlap"]) == pytest.approx((1, 0), abs=1e-6)
    assert found["shared"]["angle"] < 0.1
    assert found["apart"]["angle"] > 89.9
    assert abs(found["apart"]["cosine"]) < 0.3
    assert found["shared"]["linear"] in few_statistics.linears


def test_updates_that_cancel_leave_nothing_together(few_statistics):
    lora = lora_along(few_statistics.linears, draw(2, 128, 0))
    loras = {"dog": lora, "cat": {key: -value if ".lora_B." in key else value for key, value in lora.items()}}
    report = interference_report(random_digits_pipeline(), loras, few_statistics, SUBJECTS, weights={"cat": 0.5})
    (pair,) = report.pairs
    assert pair["cosine"] == pytest.approx(-1)
    alone = report.moved["preserved"]
    assert alone["cat"] == pytest.approx(0.25 * alone["dog"])
    assert pair["preserved"] == pytest.approx(0.25 * alone["dog"]) == pytest.approx(alone[TOGETHER])
    assert (pair["shares"]["dog"], pair["shares"]["cat"]) == pytest.approx((0.25, 4))


def change(pipeline: StableDiffusionPipeline, prompts: list[str], adapters: list[str]) -> float:
    """How far adapters move what the UNet gives for prompts, relative to what it gives."""
    text = pipeline.encode_prompt(prompts, "cpu", 1, False)[0]
    latents = torch.randn(len(prompts), 4, 8, 8, generator=torch.Generator().manual_seed(0))
    outputs = []
    for names in ([], adapters):
        pipeline.enable_lora() if names else pipeline.disable_lora()
        if names:
            pipeline.set_adapters(names)
        with torch.no_grad():
            outputs += [pipeline.unet(latents, step, text).sample for step in (900, 400)]
    moved = sum((a - b).square().sum() for a, b in zip(outputs[:2], outputs[2:]))
    return (moved / sum(a.square().sum() for a in outputs[:2])).item()


@two_adapters
def test_the_order_of_what_moves_is_that_of_the_models_outputs(few_statistics):
    pipeline, linears = random_digits_pipeline(), few_statistics.linears
    plain = lora_along(linears, draw(2, 128, 0), scale=0.3)
    loras = {
        "dog": debleed_lora(plain, few_statistics, energy=0),
        "cat": lora_along(linears, draw(2, 128, 3), 3, 0.02),
    }
    report = interference_report(pipeline, loras, few_statistics, SUBJECTS)
    for name, lora in loras.items():
        pipeline.load_lora_weights(dict(lora), adapter_name=name)
    readings = {**SUBJECTS, "preserved": FEW_PROMPTS}
    chosen = {"dog": ["dog"], "cat": ["cat"], TOGETHER: ["dog", "cat"]}
    predicted, measured = [], []
    for reading, prompts in readings.items():
        for by, adapters in chosen.items():
            predicted.append(report.moved[reading][by])
            measured.append(change(pipeline, prompts, adapters))
    clear = [(a, b) for a in range(9) for b in range(9) if predicted[a] > 4 * predicted[b]]  # twice as far
    assert len(clear) > 15
    assert all(measured[a] > measured[b] for a, b in clear), list(zip(predicted, measured))
    assert report.moved["preserved"]["dog"] < 1e-9 < 1e-3 < report.moved["cat"]["dog"]


def state_of(pipeline: StableDiffusionPipeline) -> dict[str, object]:
    models = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
    return {
        f"{part}.{name}": (module, module.training, getattr(module, "_active_adapter", None), module._forward_hooks)
        for part, model in models.items()
        for name, module in model.named_modules()
    } | {"weights": {f"{n}.{k}": v.clone() for n, m in models.items() for k, v in m.state_dict().items()}}


def assert_as_before(pipeline: StableDiffusionPipeline, before: dict[str, object]) -> None:
    after = state_of(pipeline)
    weights = [state.pop("weights") for state in (before, after)]
    assert list(before) == list(after)
    assert all(
        first[0] is second[0] and first[1:] == second[1:] for first, second in zip(before.values(), after.values())
    )
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def text_lora(pipeline: StableDiffusionPipeline) -> dict[str, torch.Tensor]:
    """Of rank 2, on a Linear of the text encoder."""
    module = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    return {
        f"{module}.lora_A.weight": draw(2, 128, 0).float(),
        f"{module}.lora_B.weight": draw(128, 2, 1).float() / 50,
    }


@two_adapters
def test_loaded_adapters_are_read_and_all_is_left_as_it_was(few_statistics):
    pipeline = random_digits_pipeline()
    loras = {
        "dog": {**lora_along(few_statistics.linears, draw(2, 128, 0)), **text_lora(pipeline)},
        "cat": lora_along(few_statistics.linears, draw(2, 128, 3), 3),
    }
    expected = interference_report(pipeline, loras, few_statistics, SUBJECTS, weights={"dog": 0.5}, text_encoders=True)
    assert expected.uncovered == {"dog": [], "cat": []}
    assert len(expected.linears) == len(few_statistics.linears) + 1
    for name, lora in loras.items():
        pipeline.load_lora_weights(dict(lora), adapter_name=name)
    pipeline.set_adapters(["dog", "cat"], [0.5, 1.0])
    before = state_of(pipeline)
    given = {"dog": None, "cat": None}
    found = interference_report(pipeline, given, few_statistics, SUBJECTS, text_encoders=True)
    assert_as_before(pipeline, before)
    assert found.linears == expected.linears
    for reading, moved in expected.moved.items():
        assert found.moved[reading] == pytest.approx(moved, rel=1e-5)
    before = state_of(pipeline)
    with pytest.raises(ValueError, match="must have loaded the adapter 'bird'"):
        interference_report(pipeline, {"bird": None, "cat": None}, few_statistics, {"bird": ["x"], "cat": ["x"]})
    wrong = {"text_encoder.none.lora_A.weight": torch.ones(1, 4), "text_encoder.none.lora_B.weight": torch.ones(4, 1)}
    with pytest.raises(ValueError, match="must change Linears that the base model has"):
        interference_report(
            pipeline, {"dog": {**loras["dog"], **wrong}, "cat": None}, few_statistics, SUBJECTS, text_encoders=True
        )
    assert_as_before(pipeline, before)
    pipeline.fuse_lora(adapter_names=["cat"])
    with pytest.raises(ValueError, match="`pipeline` must have no fused LoRA, got one"):
        interference_report(pipeline, given, few_statistics, SUBJECTS)


def test_drifts_are_those_of_each_lora_and_what_is_not_covered_is_told(few_statistics):
    pipeline = random_digits_pipeline()
    half = few_statistics.linears[::2]
    loras = {
        "dog": lora_along(few_statistics.linears, draw(2, 128, 0)),
        "cat": {**lora_along(half, draw(2, 128, 3), 3), **text_lora(pipeline)},
    }
    report = interference_report(pipeline, loras, few_statistics, SUBJECTS)
    for name, lora in loras.items():
        drifts = relative_drift(lora, few_statistics, pipeline)
        assert report.moved["preserved"][name] == pytest.approx(sum(drifts.values()) / len(report.linears))
    assert report.uncovered["cat"] == ["text_encoder.text_model.encoder.layers.0.self_attn.q_proj"]
    lines = report.to_table().splitlines()
    assert lines[0] == "| moves what is read for | dog | cat | preserved |"
    assert [line.count("|") for line in lines] == [5] * 5 + [0] + [8] * 3
    dog = report.moved["cat"]["dog"]
    assert lines[2].split(" | ")[2] == f"{dog:.3g}"
    assert lines[-1].startswith("| dog and cat | ")
    apart = InterferenceReport(
        report.moved, [{**report.pairs[0], "overlap": None, "angle": None}], report.linears, report.uncovered
    )
    assert apart.to_table().endswith(" | - | - |")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loras": {"dog": {}}}, "`loras` must be two or more"),
        ({"loras": {"preserved": {}, "dog": {}}}, "none named 'preserved' or 'together'"),
        ({"subject_prompts": {"dog": ["a"]}}, "`subject_prompts` must be given for each of"),
        ({"weights": {"bird": 1.0}}, "and `weights` for no other"),
        (
            {"subject_prompts": {"dog": "a dog", "cat": ["a"]}},
            "`subject_prompts\\['dog'\\]` must be a list of prompts",
        ),
    ],
)
def test_bad_input_is_refused(few_statistics, digits, changes, message):
    lora = lora_along(few_statistics.linears[:1], draw(2, 128, 0))
    arguments = {"loras": {"dog": lora, "cat": lora}, "subject_prompts": SUBJECTS, **changes}
    with pytest.raises(ValueError, match=message):
        interference_report(digits, statistics=few_statistics, **arguments)


def test_a_lora_of_which_nothing_is_known_is_refused(few_statistics, digits):
    loras = {"dog": lora_along(few_statistics.linears[:1], draw(2, 128, 0)), "cat": text_lora(digits)}
    with pytest.raises(ValueError, match="`statistics` must cover modules of every LoRA, got none of 'cat'"):
        interference_report(digits, loras, few_statistics, SUBJECTS)
    digits.load_lora_weights(dict(loras["dog"]), adapter_name="dog")
    found = loaded_lora(digits, "dog")
    assert all(torch.equal(tensor, loras["dog"][key]) for key, tensor in found.items())
