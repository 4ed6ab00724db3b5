"""Golden noise in modular pipelines of diffusers, and their way over the Hub."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import ModularPipeline
from huggingface_hub import ModelCard

from diffusers_ext import ExtendedBlocks, GoldenNoiseStep, families, push_modular_pipeline, save_modular_pipeline
from diffusers_ext.families import find_modular_family
from diffusers_ext.golden_noise.diversity import spread_pictures
from tests.golden_noise.golden_pipelines import (
    FAMILIES,
    PROMPTS,
    draw,
    random_network,
    record_refining,
    seeded,
    with_network,
)
from tests.golden_noise.test_pipelines import as_given
from tests.installed_versions import lacking
from tests.tiny_current_pipelines import tiny_wan_pipeline

BLOCKS = {
    "sdxl": "StableDiffusionXLAutoBlocks",
    "sd3": "StableDiffusion3AutoBlocks",
    "flux": "FluxAutoBlocks",
    "flux2": "Flux2KleinAutoBlocks",
    "flux2_dev": "Flux2AutoBlocks",
    "qwen_image": "QwenImageAutoBlocks",
    "z_image": "ZImageAutoBlocks",
}
UNGUIDED = ("sd3", "qwen_image")  # whose blocks are not guided without a negative prompt for each prompt


def modular_pipeline(plain, family: str, steps=(GoldenNoiseStep,)) -> ModularPipeline:
    """The plain pipeline's components in the family's modular blocks."""
    if reason := lacking(BLOCKS[family]):
        pytest.skip(reason)
    pipeline = ExtendedBlocks(BLOCKS[family], steps).init_pipeline()
    components = {name: part for name, part in plain.components.items() if name in pipeline._component_specs}
    pipeline.update_components(**components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def call(pipeline: ModularPipeline, family: str, **arguments) -> torch.Tensor:
    pixels = FAMILIES[family].pixels
    defaults = {"height": pixels, "width": pixels, "output_type": "pt", "num_inference_steps": 2}
    defaults |= {"prompt": PROMPTS, "generator": seeded(0, 1)}
    if family in UNGUIDED:
        defaults["negative_prompt"] = ["", ""]
    given = {**defaults, **FAMILIES[family].call, **arguments}
    given["prompt"] = list(given["prompt"])  # into which Z-Image's blocks write
    return pipeline(**given, output="images")


def named_blocks(blocks) -> list[str]:
    """Names of all blocks in blocks."""
    return [found for name, block in blocks.sub_blocks.items() for found in (name, *named_blocks(block))]


@pytest.fixture(scope="module", params=BLOCKS)
def pipelines(request):
    """Name of a family, its plain pipeline, and the modular one of the same components."""
    plain = FAMILIES[request.param].plain()
    plain.set_progress_bar_config(disable=True)
    return request.param, plain, modular_pipeline(plain, request.param)


def test_without_a_network_or_at_scale_zero_it_is_the_plain_modular_pipeline(pipelines):
    family, plain, modular = pipelines
    expected = call(modular_pipeline(plain, family, ()), family)
    modular.update_components(noise_model=None)
    assert call(modular, family).equal(expected)
    modular.update_components(noise_model=random_network(plain))
    assert call(modular, family, golden_noise_scale=0).equal(expected)
    assert not call(modular, family).allclose(expected, atol=0.05)


def test_it_refines_as_the_golden_pipeline_does(pipelines):
    family, plain, modular = pipelines
    golden = with_network(plain, family)
    modular.update_components(noise_model=golden.noise_model)
    calls = record_refining(golden)
    arguments = {
        "prompt": PROMPTS,
        "num_images_per_prompt": 2,
        "generator": seeded(0, 1, 2, 3),
        "golden_noise_scale": 0.7,
    }
    # The default of the blocks' guider; others have the pipeline's own.
    guidance = {"guidance_scale": 7.5} if family == "sdxl" else {}
    guidance |= {"negative_prompt": ["", ""]} if family in UNGUIDED else {}
    expected = draw(golden, family, **arguments, **guidance)
    picture = call(modular, family, **{**arguments, "generator": seeded(0, 1, 2, 3)})
    one, other = calls
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.equal(other[name]) if isinstance(value, torch.Tensor) else value == other[name], name
    given = {"latents": as_given(golden, other["golden"]), "num_images_per_prompt": 2, "generator": None}
    assert call(modular_pipeline(plain, family, ()), family, **given).equal(picture)
    if family not in ("flux2", "z_image"):  # whose blocks draw something else from the same noise
        # Rows between them diffusers' blocks of SDXL and Qwen-Image draw by the text of the other prompt in part.
        torch.testing.assert_close(picture[[0, 3]], expected[[0, 3]], atol=1e-4, rtol=0)


def test_diversity_is_the_golden_pipelines(pipelines):
    family, plain, modular = pipelines
    bare = modular_pipeline(plain, family, ())
    expected = call(bare, family)
    modular.update_components(noise_model=None)
    assert call(modular, family, diversity=0).equal(expected)
    spread = call(modular, family, diversity=1, diversity_of="both")
    with spread_pictures(bare, find_modular_family(bare), 1, "both"):  # as the golden pipeline's call does it
        assert call(bare, family).equal(spread)
    assert not spread.allclose(expected, atol=1e-3)
    assert call(modular, family).equal(expected)
    if family in ("flux2", "z_image"):  # whose blocks draw something else from the same noise
        return
    golden = FAMILIES[family].golden.from_pipe(plain)
    golden.set_progress_bar_config(disable=True)
    guidance = {"guidance_scale": 7.5} if family == "sdxl" else {}
    guidance |= {"negative_prompt": ["", ""]} if family in UNGUIDED else {}
    arguments = {"prompt": PROMPTS, "generator": seeded(0, 1), "num_inference_steps": 2}
    wanted = draw(golden, family, **arguments, diversity=1, diversity_of="both", **guidance)
    torch.testing.assert_close(spread, wanted, atol=2e-3, rtol=0)


def test_clips_of_wan_are_refined_frame_by_frame():
    plain = tiny_wan_pipeline()
    pipeline = ExtendedBlocks("WanBlocks", [GoldenNoiseStep]).init_pipeline()
    pipeline.update_components(**{name: getattr(plain, name) for name in ("text_encoder", "tokenizer", "transformer")})
    pipeline.update_components(vae=plain.vae, scheduler=plain.scheduler, noise_model=random_network(plain))
    pipeline.set_progress_bar_config(disable=True)
    calls = record_refining(pipeline)
    shape = {"height": 16, "width": 16, "num_frames": 5, "num_inference_steps": 1, "max_sequence_length": 8}
    state = pipeline(prompt=PROMPTS[0], output_type="pt", generator=seeded(3), **shape)
    (one,) = calls
    noise = torch.randn(1, *one["noise"].unsqueeze(0).transpose(1, 2).shape[1:], generator=seeded(3)[0])
    assert one["noise"].equal(noise[0].transpose(0, 1))
    text = state.get("prompt_embeds").expand(len(one["noise"]), -1, -1)
    assert one["prompt_embeds"].equal(text)
    for frame, golden in zip(one["noise"], one["golden"]):
        alone = pipeline.noise_model.refine(frame[None], text[:1])
        torch.testing.assert_close(golden[None], alone)


@pytest.mark.parametrize("pipelines", ["sdxl", "sd3", "flux"], indirect=True)
def test_a_pushed_pipeline_comes_back_with_trust_alone(hub, pipelines):
    family, plain, _ = pipelines
    plain.push_to_hub("tester/base")
    made = ExtendedBlocks(BLOCKS[family], [GoldenNoiseStep]).init_pipeline("tester/base")
    made.load_components()
    made.update_components(noise_model=random_network(plain))
    push_modular_pipeline(made, "tester/golden", base_model="tester/base", license="mit")
    files = hub.files("tester/golden")
    assert {name.partition("/")[0] for name in files} == {
        "README.md", "modular_blocks.py", "modular_config.json", "modular_model_index.json", "noise_model",
    }  # fmt: skip
    index = json.loads(files["modular_model_index.json"])
    assert index["noise_model"][2]["type_hint"] == ["diffusers_ext", "GoldenNoiseModel"]
    sources = {entry[2]["pretrained_model_name_or_path"] for entry in index.values() if isinstance(entry, list)}
    assert sources - {None} == {"tester/base", "tester/golden"}
    card = ModelCard(files["README.md"].decode())
    assert (card.data.base_model, card.data.license) == ("tester/base", "mit")
    assert "`golden_noise_scale`" in card.text
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        ModularPipeline.from_pretrained("tester/golden")
    loaded = ModularPipeline.from_pretrained("tester/golden", trust_remote_code=True)
    loaded.load_components()
    loaded.set_progress_bar_config(disable=True)
    made.set_progress_bar_config(disable=True)
    assert call(loaded, family).equal(call(made, family))
    assert not call(loaded, family).equal(call(loaded, family, golden_noise_scale=0))


@pytest.mark.parametrize("pipelines", ["z_image"], indirect=True)
def test_a_saved_pipeline_brings_what_others_cannot_load(tmp_path, pipelines):
    family, plain, modular = pipelines
    modular.update_components(noise_model=random_network(plain))
    save_modular_pipeline(modular, tmp_path / "saved")
    loaded = ModularPipeline.from_pretrained(str(tmp_path / "saved"), trust_remote_code=True)
    loaded.load_components()
    loaded.set_progress_bar_config(disable=True)
    torch.testing.assert_close(call(loaded, family), call(modular, family), atol=1e-5, rtol=0)


@pytest.mark.parametrize("pipelines", ["flux"], indirect=True)
def test_what_does_not_fit_is_refused(pipelines):
    family, plain, modular = pipelines
    modular.update_components(noise_model=random_network(plain, in_channels=3))
    with pytest.raises(ValueError, match="`noise_model` must have `in_channels`"):
        call(modular, family)
    modular.update_components(noise_model=random_network(plain))
    with pytest.raises(ValueError, match="`golden_noise_scale` must be finite"):
        call(modular, family, golden_noise_scale=float("nan"))
    with pytest.raises(ValueError, match=r"`diversity` must be finite and in \[0, 1\]"):
        call(modular, family, diversity=2)
    with pytest.raises(ValueError, match="`diversity_of` must be one of"):
        call(modular, family, diversity=1, diversity_of="noise")


@pytest.mark.parametrize("pipelines", ["flux"], indirect=True)
def test_blocks_and_steps_are_checked(pipelines):
    _, plain, _ = pipelines
    with pytest.raises(ValueError, match="`base` must be a class of diffusers' modular blocks"):
        ExtendedBlocks("FluxPipeline", [GoldenNoiseStep])
    with pytest.raises(TypeError, match="`steps` must be classes of steps"):
        ExtendedBlocks("FluxAutoBlocks", [torch.nn.Linear])
    with pytest.raises(ValueError, match="`base` must be one of .* for golden noise"):
        ExtendedBlocks("QwenImageEditAutoBlocks", [GoldenNoiseStep])
    with pytest.raises(TypeError, match="`pipeline` must be a modular pipeline of ExtendedBlocks"):
        save_modular_pipeline(plain, "nowhere")


def test_every_family_with_modular_blocks_has_a_place_for_the_step(subtests):
    for family in families.FAMILIES:
        for base in family.modular_blocks:
            if lacking(base):
                with pytest.raises(ValueError, match=f"must be a class .* got '{base}' of diffusers"):
                    ExtendedBlocks(base, [])
                continue
            with subtests.test(base=base):
                pipeline = ExtendedBlocks(base, [GoldenNoiseStep]).init_pipeline()
                assert find_modular_family(pipeline) is family
                assert "noise_model" in pipeline.config
                assert [name for name in named_blocks(pipeline.blocks) if name.endswith("golden_noise")]
