"""Linears that read text alone, found in real classes of every kind of text entry."""

from __future__ import annotations

import pytest
import torch

from diffusers_ext.core.pipelines import denoiser_of
from diffusers_ext.families import find_family
from diffusers_ext.nullspace.edit_equations import added_updates
from diffusers_ext.nullspace.text_only import (
    TextReader,
    denoiser_arguments,
    digest,
    lora_name,
    text_only_linears,
    text_readers,
)
from tests.tiny_current_pipelines import (
    tiny_auraflow_pipeline,
    tiny_flux2_pipeline,
    tiny_ltx2_pipeline,
    tiny_qwen_image_pipeline,
    tiny_wan_pipeline,
    tiny_z_image_pipeline,
)
from tests.tiny_digits import random_digits_pipeline
from tests.tiny_image_pipelines import (
    tiny_chroma_pipeline,
    tiny_flux_pipeline,
    tiny_hunyuan_dit_pipeline,
    tiny_sd3_pipeline,
)
from tests.tiny_pipelines import sdxl_pipeline

PROMPTS = ("a red three", "a blue nine")


@pytest.mark.parametrize("build", [random_digits_pipeline, sdxl_pipeline])
def test_keys_and_values_of_a_unet_read_the_token_embeddings(build):
    pipeline = build()
    names = [name for name, _ in pipeline.unet.named_modules() if name.endswith(("attn2.to_k", "attn2.to_v"))]
    found = text_only_linears(pipeline, prompts=PROMPTS)
    # The pooled text of SDXL enters together with the picture's size.
    assert sorted(found) == sorted(names)
    assert set(found.values()) == {"text"}


@pytest.mark.parametrize("build", [tiny_sd3_pipeline, tiny_flux_pipeline])
def test_joint_transformers_read_text_alone_before_their_blocks(build):
    embedder = "time_text_embed.text_embedder"
    assert text_only_linears(build(), prompts=PROMPTS) == {
        "context_embedder": "text",
        f"{embedder}.linear_1": "pooled_projections",
        f"{embedder}.linear_2": f"{embedder}.linear_2",
    }


REFINER = (
    *(f"attention.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"feed_forward.{name}" for name in ("w1", "w3", "w2")),
)
EMBEDDER = "condition_embedder.text_embedder"


@pytest.mark.parametrize(
    ("build", "found"),
    [
        (tiny_flux2_pipeline, {"context_embedder": "text"}),
        (tiny_chroma_pipeline, {"context_embedder": "text"}),
        (tiny_auraflow_pipeline, {"context_embedder": "text"}),
        (tiny_qwen_image_pipeline, {"txt_in": "txt_in"}),
        (tiny_z_image_pipeline, dict.fromkeys(["cap_embedder.1", *(f"context_refiner.0.{name}" for name in REFINER)])),
        (
            tiny_wan_pipeline,
            {
                f"{EMBEDDER}.linear_1": "text",
                f"{EMBEDDER}.linear_2": f"{EMBEDDER}.linear_2",
                **{f"blocks.{i}.attn2.to_{x}": "blocks.0.attn2.to_k" for i in range(2) for x in "kv"},
            },
        ),
    ],
)
def test_todays_models_read_text_alone_in_the_order_in_which_they_run(build, found):
    linears = text_only_linears(build(), prompts=PROMPTS)
    assert list(linears) == list(found)
    # The refiner's sources are the Linears that first read them.
    assert all(source is None or linears[name] == source for name, source in found.items())


def test_connectors_before_the_denoiser_are_read_and_named_as_their_component():
    call = {"max_sequence_length": 16, "height": 32, "width": 32, "num_frames": 1}
    pipeline = tiny_ltx2_pipeline()
    linears = text_only_linears(pipeline, prompts=PROMPTS, **call)
    first, *_, last = linears
    assert (first, last) == ("connectors.text_proj_in", "transformer_blocks.0.audio_attn2.to_v")
    assert linears["caption_projection.linear_1"] == "text"
    assert linears["audio_caption_projection.linear_1"] == "audio_encoder_hidden_states"
    assert [lora_name(pipeline, name) for name in (first, last)] == [first, f"transformer.{last}"]
    # The text encoder is padded on the left; its tokens are read from where they begin.
    reader = TextReader(pipeline, linears, 8, call)
    read = reader.all(["a three", "a red three"], first)
    (short,), (long,) = (find_family(pipeline).token_ids(pipeline, prompt) for prompt in ("a three", "a red three"))
    assert read.any(-1).sum(1).tolist() == [len(short), len(long)]
    assert read[:, 0].any()
    # Updates of the connectors reach what the denoiser is handed.
    before, a = reader.all(["a three"], "text"), torch.ones(1, 144, dtype=torch.float64)
    with added_updates(text_readers(pipeline), {first: (a, torch.ones(48, 1, dtype=torch.float64))}):
        assert not torch.allclose(reader.all(["a three"], "text"), before)


@pytest.mark.parametrize("build", [tiny_qwen_image_pipeline, tiny_z_image_pipeline])
def test_texts_as_long_as_their_prompts_are_read_one_by_one(build):
    pipeline = build()
    sources = text_only_linears(pipeline, prompts=PROMPTS)
    reader, first = TextReader(pipeline, sources, 8, {}), next(iter(sources.values()))
    assert reader.varies
    prompts = ["a nine", "a photo of the red nine"]
    alone = [reader.all([prompt], first) for prompt in prompts]
    both = reader.all(prompts, first)
    for index, read in enumerate(alone):
        assert torch.equal(both[index, : read.shape[1]], read[0])
        assert not both[index, read.shape[1] :].any()


def test_what_text_only_layers_give_is_text_as_well():
    found = text_only_linears(tiny_hunyuan_dit_pipeline(), prompts=PROMPTS)
    keys = {name for name in found if name.endswith(("attn2.to_k", "attn2.to_v"))}
    assert len(keys) == 8
    assert {found[name] for name in keys} == {"blocks.0.attn2.to_k"}
    assert found["text_embedder.linear_1"] == "encoder_hidden_states_t5"


def test_probing_leaves_the_pipeline_as_it_was():
    pipeline = random_digits_pipeline()
    scheduler, state = pipeline.scheduler, {k: v.clone() for k, v in pipeline.unet.state_dict().items()}
    text_only_linears(pipeline, prompts=PROMPTS)
    assert pipeline.scheduler is scheduler
    assert all(torch.equal(state[name], value) for name, value in pipeline.unet.state_dict().items())
    assert not any(module._forward_pre_hooks for module in pipeline.unet.modules())


def test_the_arguments_of_the_denoiser_are_those_of_its_pipeline():
    pipeline = random_digits_pipeline()
    handed = denoiser_arguments(pipeline, ["a red three", "a blue nine"])
    wanted = pipeline.encode_prompt(["a red three", "a blue nine"], "cpu", 1, False)[0]
    assert torch.equal(handed["encoder_hidden_states"], wanted)
    assert not denoiser_of(pipeline)._forward_pre_hooks


@pytest.mark.parametrize("prompts", [("a red three",), ("a red three", "a red three")])
def test_prompts_that_are_not_two_are_refused(prompts):
    with pytest.raises(ValueError, match="`prompts` must be"):
        text_only_linears(random_digits_pipeline(), prompts=prompts)


def test_a_digest_tells_bits_and_dtypes_apart_but_no_shapes():
    x = torch.tensor([0.0, 1.0])
    assert len({digest(tensor) for tensor in (x, -x, x.half(), x.bfloat16())}) == 4
    assert digest(x[None]) == digest(x)
    assert digest(torch.zeros(2)) == digest(x[:1].expand(2))
