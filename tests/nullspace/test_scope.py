"""What trains in a joint model, and that preserved prompts keep their outputs where it is text alone."""

from __future__ import annotations

from importlib.metadata import version

import pytest
import torch
from diffusers import SD3Transformer2DModel
from transformers import T5Config, T5EncoderModel

from diffusers_ext.core.capture import capture
from diffusers_ext.core.restored_state import quiet_run
from diffusers_ext.nullspace.collect import collect_statistics
from diffusers_ext.nullspace.directions import null_space_directions
from diffusers_ext.nullspace.lora import add_null_space_lora, predicted_drift, save_lora
from diffusers_ext.nullspace.prompts import preserved_texts
from diffusers_ext.nullspace.scope import scoped_linears, settle_scope, shared_reads
from diffusers_ext.nullspace.statistics import FeatureStatistics
from tests.tiny_digits import random_digits_pipeline
from tests.tiny_image_pipelines import tiny_flux_pipeline, tiny_sd3_pipeline

RUN = {"height": 32, "width": 32, "num_inference_steps": 2, "guidance_scale": 2.0}
KNOWN, SUBJECT = "a red seven", "a white sks"


@pytest.fixture(scope="module")
def flux():
    return tiny_flux_pipeline()


@pytest.fixture(scope="module")
def sd3():
    return tiny_sd3_pipeline()


def test_scopes_of_sd3(sd3):
    assert scoped_linears(sd3, "text_only") == ({"context_embedder": "text"}, {})
    stream = scoped_linears(sd3, "text_stream")
    blocks = [f"transformer_blocks.{index}.attn" for index in (0, 1)]
    assert stream.runs == {f"{b}.{end}": f"{b}.add_k_proj" for b in blocks for end in ("add_k_proj", "add_v_proj")}
    assert stream.names == ["context_embedder", *stream.runs]
    everything = scoped_linears(sd3, "all").runs
    # The last block gives no text, so nothing leads its way out.
    assert len(everything) == 8 + 7
    assert everything[f"{blocks[0]}.to_v"] == f"{blocks[0]}.to_k"
    assert everything[f"{blocks[0]}.to_out.0"] == f"{blocks[0]}.to_out.0"


def test_scopes_of_flux(flux):
    assert scoped_linears(flux, "text_stream").names == [
        "context_embedder", "transformer_blocks.0.attn.add_k_proj", "transformer_blocks.0.attn.add_v_proj",
    ]  # fmt: skip
    assert len(scoped_linears(flux, "all").runs) == 8 + 3
    assert shared_reads(flux, []) == {}


def test_a_unet_has_no_scope(flux):
    unet = random_digits_pipeline().unet
    assert settle_scope(unet, None) is None
    assert settle_scope(flux.transformer, None) == "text_stream"
    with pytest.raises(ValueError, match="`scope` must be left out for a UNet2DConditionModel, got 'all'"):
        settle_scope(unet, "all")
    with pytest.raises(ValueError, match="`scope` must be one of .*, got 'text'"):
        settle_scope(flux.transformer, "text")
    with pytest.raises(ValueError, match=r"`features` must be left out for a joint-attention model, got \('q',\)"):
        collect_statistics(flux, [KNOWN], features=["q"])
    with pytest.raises(ValueError, match="`runs_per_prompt` must be at least 1, got 0"):
        collect_statistics(flux, [KNOWN], runs_per_prompt=0)


def test_layers_that_read_nothing_new_are_left_alone(sd3, caplog):
    old = collect_statistics(sd3, [KNOWN], **RUN)
    new = collect_statistics(sd3, [SUBJECT], include_guidance_prompts=False, **RUN)
    key = "transformer_blocks.1.attn.add_k_proj"
    new.moments[key] = old.moments[key]
    directions = null_space_directions(old, new, 1)
    assert "1 of 2 matrices read nothing new and are left alone" in caplog.text
    assert key not in directions.sources
    assert len(directions.sources) == 3
    with pytest.raises(ValueError, match="must have directions that the preserved prompts do not use"):
        null_space_directions(old, FeatureStatistics(old.moments, old.sources, new.facts), 1)


def test_statistics_are_of_what_the_linears_read(sd3, tmp_path):
    statistics = collect_statistics(sd3, [KNOWN], scope="text_stream", runs_per_prompt=2, batch_size=1, **RUN)
    name = "transformer_blocks.0.attn.add_v_proj"
    seen: list[torch.Tensor] = []
    with quiet_run(sd3), capture(sd3.transformer, name, lambda _, x: seen.append(x.flatten(0, 1).double())):
        for index, prompt in enumerate([KNOWN, "", KNOWN, ""]):
            generator = [torch.Generator().manual_seed(index)]
            sd3(prompt=[prompt], generator=generator, output_type="latent", **RUN)
    rows = torch.cat(seen)
    found = statistics.moments[statistics.key(name)]
    assert found.count == len(rows)
    torch.testing.assert_close(found.mean, rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)
    statistics.save_pretrained(tmp_path)
    read = FeatureStatistics.from_pretrained(tmp_path)
    assert read.facts["settings"]["scope"] == "text_stream"
    assert read.facts["settings"]["run"]["runs_per_prompt"] == 2
    assert read.layers[0] == "context_embedder"
    assert {"text_encoder_3", "denoiser"} <= set(read.facts["models"])


def test_the_empty_prompt_weighs_as_guidance_reads_it(sd3, flux):
    prompts = [KNOWN, "a blue one"]

    def texts(pipeline, **arguments):
        return collect_statistics(pipeline, prompts, scope="text_only", **arguments).moments["text"]

    assert texts(sd3, expand_sub_phrases=False).count == 4 * 272
    # FLUX.1-dev is told the guidance scale, and never reads the empty prompt beside another.
    assert texts(flux, expand_sub_phrases=False).count == 3 * 512
    assert texts(sd3, include_guidance_prompts=False).count == len(preserved_texts(prompts)) * 272


def wide_sd3():
    """Its text is wider than two prompts have tokens, which leaves a true null space."""
    pipeline = tiny_sd3_pipeline()
    torch.manual_seed(0)
    config = pipeline.text_encoder_3.config
    small = {"vocab_size": config.vocab_size, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    pipeline.text_encoder_3 = T5EncoderModel(T5Config(d_model=600, **small)).eval()
    transformer = SD3Transformer2DModel.from_config(pipeline.transformer.config, joint_attention_dim=600)
    pipeline.register_modules(transformer=transformer.eval())
    return pipeline


def drawn(pipeline, prompt: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    run = {**RUN, "height": 16, "num_inference_steps": 3}
    with quiet_run(pipeline):
        return pipeline(prompt, generator=generator, output_type="latent", **run).images


def test_text_alone_keeps_preserved_prompts_exactly(tmp_path):
    pipeline = wide_sd3()
    before = {prompt: drawn(pipeline, prompt) for prompt in (KNOWN, SUBJECT)}
    statistics = collect_statistics(pipeline, [KNOWN], scope="text_only", expand_sub_phrases=False)
    chosen = add_null_space_lora(
        pipeline.transformer, statistics, instance_prompts=[SUBJECT], pipeline=pipeline, directions="null", rank=2
    )
    assert chosen.null_space == "numerical null space, exact in float32"
    b = pipeline.transformer.context_embedder.lora_B["default"].weight
    torch.nn.init.normal_(b, std=0.5)
    assert predicted_drift(pipeline.transformer, statistics)["context_embedder"] == pytest.approx(0, abs=1e-6)
    save_lora(type(pipeline), pipeline.transformer, tmp_path)
    stock = wide_sd3()
    stock.load_lora_weights(str(tmp_path))
    moved = {prompt: (drawn(stock, prompt) - latents).norm() / latents.norm() for prompt, latents in before.items()}
    assert moved[KNOWN] < 1e-5
    # The random text encoder of transformers 4 is another.
    assert moved[SUBJECT] > (1e-3 if int(version("transformers").split(".")[0]) > 4 else 5e-4)
