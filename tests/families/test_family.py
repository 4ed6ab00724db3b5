from __future__ import annotations

import pytest
import torch

from diffusers_ext import families
from diffusers_ext.families import match_family
from diffusers_ext.families.family import TextConditioning
from diffusers_ext.golden_noise.redenoise import encode_prompts
from tests.golden_noise.redenoise_cases import BUILDERS, PROMPTS


@pytest.mark.parametrize("family", BUILDERS)
def test_each_prompt_has_its_own_conditioning(family):
    pipeline = BUILDERS[family]()
    text = encode_prompts(pipeline, PROMPTS)
    assert len(text) == 2
    for prompt, index in zip(PROMPTS, range(2)):
        alone = encode_prompts(pipeline, [prompt])
        assert alone.tensors().keys() == text.tensors().keys()
        for name, tensor in text[[index]].tensors().items():
            torch.testing.assert_close(tensor, alone.tensors()[name], msg=name)
    assert not torch.equal(text.prompt_embeds[0], text.prompt_embeds[1])
    assert not any(tensor.requires_grad for tensor in text.tensors().values())


def test_clip_text_is_that_of_the_pipeline():
    pipeline = BUILDERS["sd"]()
    expected = pipeline.encode_prompt(PROMPTS, "cpu", 1, True, ["green", "green"])
    text = encode_prompts(pipeline, PROMPTS, "green")
    assert torch.equal(text.prompt_embeds, expected[0])
    assert torch.equal(text.negative_prompt_embeds, expected[1])
    assert text.attention_mask is None
    assert text.pooled_prompt_embeds is None


@pytest.mark.parametrize("force_zeros", [True, False])
def test_sdxl_makes_zeros_of_no_negative_prompt_where_its_pipeline_does(force_zeros):
    pipeline = BUILDERS["sdxl"]()
    pipeline.register_to_config(force_zeros_for_empty_prompt=force_zeros)
    text = encode_prompts(pipeline, PROMPTS)
    assert text.negative_prompt_embeds.any() != force_zeros
    assert text.negative_pooled_prompt_embeds.any() != force_zeros
    assert encode_prompts(pipeline, PROMPTS, "").negative_prompt_embeds.any()


def test_hunyuan_dit_has_two_encoders_with_masks():
    text = encode_prompts(BUILDERS["hunyuan_dit"](), PROMPTS)
    assert text.prompt_embeds.shape == (2, 77, 8)
    assert text.prompt_embeds_2.shape == (2, 256, 8)
    for mask in (text.attention_mask, text.attention_mask_2):
        assert (mask.sum(1) == 5).all()  # three words, start and end
    assert (text.negative_attention_mask_2.sum(1) == 2).all()


def test_flux_has_negative_text_unless_guidance_is_embedded():
    assert encode_prompts(BUILDERS["flux_schnell"](), PROMPTS).negative_prompt_embeds is not None
    assert encode_prompts(BUILDERS["flux_dev"](), PROMPTS).negative_prompt_embeds is None
    with pytest.raises(ValueError, match="`negative_prompt` must be None .* got 'green'"):
        encode_prompts(BUILDERS["flux_dev"](), PROMPTS, "green")


def test_encoders_are_asked_in_eval_mode_and_keep_their_modes():
    pipeline = BUILDERS["sd"]()
    plain = encode_prompts(pipeline, PROMPTS).prompt_embeds
    for module in pipeline.text_encoder.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.train()
    pipeline.unet.train()
    modes = [m.training for x in (pipeline.text_encoder, pipeline.unet) for m in x.modules()]
    state = dict(vars(pipeline))
    assert torch.equal(encode_prompts(pipeline, PROMPTS).prompt_embeds, plain)
    assert modes == [m.training for x in (pipeline.text_encoder, pipeline.unet) for m in x.modules()]
    assert vars(pipeline) == state


@pytest.mark.parametrize("prompts", [[], "a red seven", ["a", None]])
def test_wrong_prompts_are_refused(prompts):
    with pytest.raises(ValueError, match="`prompts` must be a non-empty list of strings, got"):
        encode_prompts(BUILDERS["sd"](), prompts)


def test_conditioning_is_cut_and_moved():
    text = TextConditioning(
        torch.arange(12.0).view(3, 2, 2),
        attention_mask=torch.ones(3, 2, dtype=torch.long),
        pooled_prompt_embeds=torch.arange(3.0).view(3, 1),
    )
    assert len(text[:2]) == 2
    assert len(text[[2]]) == 1
    for index in ([2, 0, 0], torch.tensor([2, 0, 0]), range(2, -1, -1)):
        assert text[index].pooled_prompt_embeds[0] == 2
        assert torch.equal(text[index].prompt_embeds[0], text.prompt_embeds[2])
        assert text[index].negative_prompt_embeds is None
    assert {x.device.type for x in text.to("meta").tensors().values()} == {"meta"}
    with pytest.raises(TypeError, match="`index` must be a slice or a list of indices, got 1"):
        text[1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt_embeds": torch.zeros(3, 2)}, r"`prompt_embeds` must be \(batch, tokens, dim\)"),
        ({"pooled_prompt_embeds": torch.zeros(2, 4)}, "`pooled_prompt_embeds` must be a batch of 3"),
        (
            {"negative_prompt_embeds": torch.zeros(3, 5, 4)},
            r"must be \(3, 2, 4\) like `prompt_embeds`, got \(3, 5, 4\)",
        ),
        ({"attention_mask": torch.ones(3, 5)}, r"must be \(3, 2\) like `prompt_embeds`, got"),
        (
            {"negative_pooled_prompt_embeds": torch.zeros(3, 4)},
            r"`negative_pooled_prompt_embeds` must be None like `pooled_prompt_embeds`, got \(3, 4",
        ),
    ],
)
def test_tensors_that_are_not_one_batch_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        TextConditioning(**{"prompt_embeds": torch.zeros(3, 2, 4), **fields})


def test_a_family_that_needs_a_newer_diffusers_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(families, "version", lambda name: "0.38.0")
    with pytest.raises(ValueError, match="`diffusers` must be 0.39 or newer for Z-Image, got 0.38.0"):
        match_family("ZImagePipeline", "golden_noise")
    assert match_family("ZImagePipeline").title == "Z-Image"  # what it is can be said
    assert match_family("FluxPipeline", "golden_noise").title == "Flux"
    monkeypatch.setattr(families, "version", lambda name: "0.39.0.dev0")
    assert match_family("ZImagePipeline", "golden_noise").name == "z_image"
