"""The steps around the denoising of modular pipelines, and their way over the Hub."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from diffusers import ModularPipeline

from diffusers_ext import (
    EraserStep,
    ExtendedBlocks,
    GoldenNoiseStep,
    NullSpaceLoraStep,
    collect_statistics,
    families,
    push_modular_pipeline,
    save_eraser,
)
from diffusers_ext.core.attention_processors import ProjectAttnProcessor, use_processors
from diffusers_ext.eraser.adapter.outputs import eraser_layers, eraser_scaled
from diffusers_ext.nullspace.projector import NullSpaceProjector
from tests.docs.snippet_models import save_subject
from tests.golden_noise.golden_pipelines import FAMILIES, random_network
from tests.golden_noise.test_modular import BLOCKS, call, modular_pipeline
from tests.hub_storage import Repository
from tests.in_a_thread import in_a_thread
from tests.installed_versions import lacking
from tests.tiny_erasers import add_random_eraser


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    """A plain SDXL, and the folder of a LoRA, of statistics and of an eraser for it."""
    folder, plain = tmp_path_factory.mktemp("steps"), FAMILIES["sdxl"].plain()
    plain.set_progress_bar_config(disable=True)
    save_subject(folder / "lora", plain)
    statistics = collect_statistics(plain, ["a red seven", "a blue one"], show_progress=False)
    statistics.save_pretrained(folder / "statistics")
    add_random_eraser(plain.unet, concept="seven")
    save_eraser(plain.unet, folder / "eraser", base_model_name_or_path="tester/base")
    return FAMILIES["sdxl"].plain(), folder


def test_an_eraser_acts_by_its_scale_and_in_its_pipeline_alone(sdxl):
    plain, folder = sdxl
    bare, modular = modular_pipeline(plain, "sdxl", ()), modular_pipeline(plain, "sdxl", (EraserStep,))
    expected = call(bare, "sdxl")
    assert call(modular, "sdxl").equal(expected)
    modular.update_components(eraser=str(folder / "eraser"))
    assert call(modular, "sdxl", eraser_scale=0).equal(expected)
    assert not getattr(plain.unet, "peft_config", {})
    erased = call(modular, "sdxl")
    assert not erased.allclose(expected, atol=1e-3)
    assert call(bare, "sdxl").equal(expected)
    assert call(modular, "sdxl", eraser_scale=0).equal(expected)
    assert call(modular, "sdxl").equal(erased)
    with pytest.raises(ValueError, match="`eraser_scale` must be finite"):
        call(modular, "sdxl", eraser_scale=-1.0)


def test_threads_that_share_a_denoiser_have_a_scale_each(sdxl):
    _, folder = sdxl
    plain = FAMILIES["sdxl"].plain()
    modular = [modular_pipeline(plain, "sdxl", (EraserStep,)) for _ in range(2)]
    for pipeline in modular:  # of a scheduler each
        pipeline.update_components(eraser=str(folder / "eraser"), scheduler=copy.deepcopy(plain.scheduler))
    scales = (0.0, 0.5, 1.0)
    expected = {scale: call(modular[0], "sdxl", eraser_scale=scale) for scale in scales}
    assert len({picture.sum().item() for picture in expected.values()}) == len(scales)
    (name,) = plain.unet.peft_config
    with eraser_scaled(plain.unet, name, 1.0):
        for scale, picture in expected.items():
            assert in_a_thread(partial(call, modular[0], "sdxl", eraser_scale=scale)).equal(picture)
        assert call(modular_pipeline(plain, "sdxl", ()), "sdxl").equal(expected[1.0])
    with ThreadPoolExecutor(2) as pool:
        asked = [(pipeline, scale) for scale in scales for pipeline in modular]
        drawn = list(pool.map(lambda given: call(given[0], "sdxl", eraser_scale=given[1]), asked))
    for (_, scale), picture in zip(asked, drawn, strict=True):
        assert picture.equal(expected[scale])
    assert call(modular_pipeline(plain, "sdxl", ()), "sdxl").equal(expected[0.0])
    assert all(not layer.scaled for layer in eraser_layers(plain.unet).values())


def test_pipelines_that_share_a_denoiser_have_an_eraser_each(sdxl, tmp_path):
    _, folder = sdxl
    plain, other = FAMILIES["sdxl"].plain(), FAMILIES["sdxl"].plain()
    add_random_eraser(other.unet, concept="seven", seed=1)
    save_eraser(other.unet, tmp_path / "another", base_model_name_or_path="tester/base")
    modular = modular_pipeline(plain, "sdxl", (EraserStep,))
    drawn = []
    for eraser in (folder / "eraser", tmp_path / "another", folder / "eraser"):
        modular.update_components(eraser=str(eraser))
        drawn.append(call(modular, "sdxl"))
    assert drawn[0].equal(drawn[2])
    assert not drawn[0].allclose(drawn[1], atol=1e-3)


def test_a_lora_is_projected_by_the_dial(sdxl):
    _, folder = sdxl
    plain = FAMILIES["sdxl"].plain()
    bare, modular = modular_pipeline(plain, "sdxl", ()), modular_pipeline(plain, "sdxl", (NullSpaceLoraStep,))
    without = call(bare, "sdxl")
    modular.update_components(lora=str(folder / "lora"), statistics=str(folder / "statistics"))
    as_it_is = call(modular, "sdxl", projection_strength=0)
    assert as_it_is.equal(call(bare, "sdxl"))
    assert not as_it_is.allclose(without, atol=1e-3)
    half = call(modular, "sdxl", projection_strength=0.5)
    statistics = collect_statistics(FAMILIES["sdxl"].plain(), ["a red seven", "a blue one"], show_progress=False)
    projector = NullSpaceProjector.from_statistics(statistics, damping=1e-3).projections()
    with use_processors(plain.unet, ProjectAttnProcessor(0.5, projector=projector), "*attn2"):
        torch.testing.assert_close(call(bare, "sdxl"), half)
    assert call(bare, "sdxl").equal(as_it_is)
    kept = call(modular, "sdxl")
    assert (kept - without).abs().mean() < (as_it_is - without).abs().mean()
    with pytest.raises(ValueError, match="`projection_strength` must be finite and in"):
        call(modular, "sdxl", projection_strength=2)
    other = modular_pipeline(plain, "sdxl", (NullSpaceLoraStep,))
    other.update_components(lora=str(folder / "other"))
    with pytest.raises(ValueError, match="`lora` must be the one that this denoiser has .* got '.*other'"):
        call(other, "sdxl")


def test_all_steps_go_over_the_hub_together(hub, sdxl):
    plain, folder = sdxl
    for name in ("lora", "statistics", "eraser"):
        repository = Repository(f"tester/{name}", "model", private=False)
        repository.put(folder / name)
        hub.repos[f"tester/{name}"] = repository
    FAMILIES["sdxl"].plain().push_to_hub("tester/base")
    steps = [GoldenNoiseStep, EraserStep, NullSpaceLoraStep]
    made = ExtendedBlocks(BLOCKS["sdxl"], steps).init_pipeline("tester/base")
    made.load_components()
    made.update_components(noise_model=random_network(plain), eraser=str(folder / "eraser"))
    with pytest.raises(ValueError, match="`eraser` must be on the Hub to be shared"):
        push_modular_pipeline(made, "tester/all", base_model="tester/base", license="mit")
    made.update_components(lora="tester/lora", statistics="tester/statistics", eraser="tester/eraser")
    push_modular_pipeline(made, "tester/all", base_model="tester/base", license="mit")
    loaded = ModularPipeline.from_pretrained("tester/all", trust_remote_code=True)
    loaded.load_components()
    for pipeline in (made, loaded):
        pipeline.set_progress_bar_config(disable=True)
    assert call(loaded, "sdxl").equal(call(made, "sdxl"))


def test_an_eraser_in_joint_attention_is_the_one_that_is_loaded_by_hand(tmp_path):
    plain, other = FAMILIES["flux"].plain(), FAMILIES["flux"].plain()
    add_random_eraser(other.transformer, concept="seven")
    save_eraser(other.transformer, tmp_path / "eraser", base_model_name_or_path="tester/base")
    modular, by_hand = modular_pipeline(plain, "flux", (EraserStep,)), modular_pipeline(other, "flux", ())
    modular.update_components(eraser=str(tmp_path / "eraser"))
    torch.testing.assert_close(call(modular, "flux"), call(by_hand, "flux"))


def test_every_familys_blocks_denoise_in_the_steps(subtests):
    for family in families.FAMILIES:
        for base in family.modular_blocks:
            if lacking(base):
                with pytest.raises(ValueError, match=f"must be a class .* got '{base}' of diffusers"):
                    ExtendedBlocks(base, [])
                continue
            with subtests.test(base=base):
                erased = family.joint_attention is not None and base != "Wan22Blocks"
                steps = [EraserStep, NullSpaceLoraStep] if erased else [NullSpaceLoraStep]
                pipeline = ExtendedBlocks(base, steps).init_pipeline()
                assert {"lora", "statistics", "damping"} < pipeline.config.keys()
                assert ("eraser" in pipeline.config) == erased


def test_erasers_for_two_transformers_are_refused():
    with pytest.raises(ValueError, match="`base` must be one of .* for an eraser, got 'Wan22Blocks'"):
        ExtendedBlocks("Wan22Blocks", [EraserStep])
