"""Edits of knowledge in closed form: exactness, bad input, and what the digits model then draws."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionPipeline

from diffusers_ext.nullspace.edit import edit_concept
from diffusers_ext.nullspace.edit_prompts import TEMPLATES, ConceptEdit
from diffusers_ext.nullspace.text_only import denoiser_arguments
from examples.digits.check_model import draw, load_pipeline
from examples.digits.judge import DigitsJudge
from examples.digits.prompts import DIGITS, HELD_OUT_TEMPLATE
from examples.digits.subjects import knowledge_prompts
from tests.tiny_digits import random_digits_pipeline
from tests.tiny_image_pipelines import tiny_sd3_pipeline


def test_the_target_reads_as_its_anchor():
    pipeline = random_digits_pipeline()
    edit = ConceptEdit("three", "nine", prompts=["a red three"])
    result = edit_concept(pipeline, [edit], ["a one"], preserve_weight=0.01, eps=1e-8, kept=1.0)
    k1, k2 = (
        denoiser_arguments(pipeline, [prompt])["encoder_hidden_states"] for prompt in ("a red three", "a red nine")
    )
    name = result.report.layers[0]["linear"]
    weight = pipeline.unet.get_submodule(name).weight
    update = result.lora[f"unet.{name}.lora_B.weight"] @ result.lora[f"unet.{name}.lora_A.weight"]
    assert torch.allclose(k1 @ (weight + update).T, k2 @ weight.T, atol=2e-2)
    assert all(row["achieved"] > 0.98 for row in result.report.layers)


def test_deeper_linears_correct_what_earlier_updates_left():
    result = edit_concept(tiny_sd3_pipeline(), {"three": "nine"}, ["a red one"])
    assert {row["source"] for row in result.report.layers} == {
        "text",
        "pooled_projections",
        "time_text_embed.text_embedder.linear_2",
    }


def test_editing_leaves_the_pipeline_as_it_was():
    pipeline = random_digits_pipeline()
    state = {k: v.clone() for k, v in pipeline.unet.state_dict().items()}
    edit_concept(pipeline, {"three": "nine"}, ["a red one"])
    assert all(torch.equal(state[name], value) for name, value in pipeline.unet.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in pipeline.unet.modules())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"edits": {}}, "`edits` must hold at least one target"),
        ({"edits": {"three": "nine"}, "kept": 0}, "`kept` must be above 0"),
        ({"edits": {"three": "THREE"}}, "`anchor` must be read otherwise than `target`"),
        ({"edits": {"three": "nine"}, "earlier": {"two": None}}, "`earlier` must name the anchors of earlier edits"),
        ({"edits": {"three": "five"}, "earlier": {"five": "three"}}, "`edits` must lead to concepts that earlier"),
    ],
)
def test_bad_input_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        edit_concept(random_digits_pipeline(), preserve=["a one"], **arguments)


def test_chained_edits_are_made_at_once():
    """What stands for "three" is the "nine" of the model as it was, though "nine" is edited, too."""
    pipeline = random_digits_pipeline()
    edits = [ConceptEdit("three", "nine", prompts=["a three"]), ConceptEdit("nine", "one", prompts=["a nine"])]
    result = edit_concept(pipeline, edits, ["red"], preserve_weight=1e-3, eps=1e-8, kept=1.0)
    prompts = ["a three", "a nine", "a one"]
    k = dict(zip(prompts, denoiser_arguments(pipeline, prompts)["encoder_hidden_states"]))
    name = result.report.layers[0]["linear"]
    weight = pipeline.unet.get_submodule(name).weight
    edited = weight + result.lora[f"unet.{name}.lora_B.weight"] @ result.lora[f"unet.{name}.lora_A.weight"]
    for target, anchor in (("a three", "a nine"), ("a nine", "a one")):
        way = k[anchor] @ weight.T - k[target] @ weight.T
        assert (k[target] @ edited.T - k[anchor] @ weight.T).norm() < 0.1 * way.norm()


def test_a_prompt_that_names_two_targets_is_read_with_both_anchors():
    pipeline, both = random_digits_pipeline(), ["three of five", "nine of six"]
    edits = [ConceptEdit("three", "nine", prompts=both[:1]), ConceptEdit("five", "six", prompts=both[:1])]
    result = edit_concept(pipeline, edits, ["red"], preserve_weight=1e-3, eps=1e-8, kept=1.0)
    target, anchor = denoiser_arguments(pipeline, both)["encoder_hidden_states"]
    name = result.report.layers[0]["linear"]
    weight = pipeline.unet.get_submodule(name).weight
    edited = weight + result.lora[f"unet.{name}.lora_B.weight"] @ result.lora[f"unet.{name}.lora_A.weight"]
    assert (target @ edited.T - anchor @ weight.T).norm() < 0.1 * ((anchor - target) @ weight.T).norm()
    assert all(row["achieved"] > 0.98 for row in result.report.concepts)


def test_what_an_earlier_edit_made_alike_is_no_anchor():
    pipeline = random_digits_pipeline(seed=2)
    first = edit_concept(pipeline, {"three": "nine"}, ["a red three", "a red one"], preserve_weight=1e-5)
    pipeline.load_lora_weights(first.lora)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    preserve = ["a red nine", "a red three", "a red one", "a red two", "a blue one"]
    (second,) = edit_concept(pipeline, {"nine": None}, preserve).edits
    assert second.anchor in ("one", "two")


def test_an_edit_takes_earlier_ones_of_its_concept_along():
    """Where "five" is read as "seven", and "seven" is to be read as "one", so is "five"; the other stays."""
    pipeline = random_digits_pipeline()
    preserve = ["a red five", "a red seven", "a red two", "a red nine", "a red one", "a blue six"]
    first = edit_concept(pipeline, {"five": "seven", "two": "nine"}, preserve)
    pipeline.load_lora_weights(first.lora)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    second = edit_concept(pipeline, {"seven": "one"}, preserve, earlier=first.edits, preserve_weight=0.01)
    assert second.told == {"seven": "one", "five": "one"}
    assert second.facts["earlier"] == {"five": "seven", "two": "nine"}
    assert edit_concept(pipeline, {"seven": "one"}, preserve).told == {"seven": "one"}
    among = [*preserve, "a blue five", "a blue two", "a blue nine"]
    assert edit_concept(pipeline, {"six": None}, among, earlier=first.edits).told["six"] == "nine"


def test_the_second_edit_keeps_four_times_as_strictly():
    preserve = ["a red one", *(template.format("two") for template in TEMPLATES)]
    usual = {"edits": {"three": "nine"}, "preserve": preserve, "expand_sub_phrases": False}
    second = edit_concept(random_digits_pipeline(), **usual, earlier={"two": "four"}).lora
    strict = edit_concept(random_digits_pipeline(), **usual, preserve_weight=4.0).lora
    assert all(second[name].equal(strict[name]) for name in strict)


def test_a_pipeline_with_a_lora_is_refused():
    pipeline = random_digits_pipeline()
    pipeline.load_lora_weights(edit_concept(pipeline, {"three": "nine"}, ["a one"]).lora)
    with pytest.raises(ValueError, match="must carry no LoRA while it is edited"):
        edit_concept(pipeline, {"seven": "eight"}, ["a one"])


@pytest.fixture(scope="module")
def edited() -> StableDiffusionPipeline:
    pipeline = load_pipeline()
    result = edit_concept(pipeline, {"three": "nine"}, knowledge_prompts())
    pipeline.load_lora_weights(result.lora)
    return pipeline


def test_the_digits_model_draws_nines_for_threes_and_the_rest_as_before(edited):
    prompts = [
        *(f"a {color} {digit}" for color in ("red", "blue") for digit in ("three", "one", "nine", "eight")),
        *(HELD_OUT_TEMPLATE.format(digit=digit, color="green") for digit in ("three", "six", "two")),
    ]
    names = DigitsJudge().read(draw(edited, prompts, seed=5, num_inference_steps=10)).names
    wanted = [next(word for word in prompt.split() if word in DIGITS) for prompt in prompts]
    assert names == [{"three": "nine"}.get(word, word) for word in wanted]
