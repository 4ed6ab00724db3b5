from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from diffusers_ext.nullspace.collect import collect_statistics
from diffusers_ext.nullspace.pipeline import NullSpaceDreamBoothPipeline, NullSpaceDreamBoothXLPipeline
from diffusers_ext.nullspace.projector import NullSpaceProjector
from diffusers_ext.nullspace.statistics import TEXT, FeatureStatistics
from examples.digits.check_model import MODEL_DIR
from tests.tiny_digits import random_digits_pipeline
from tests.tiny_lora import add_random_lora
from tests.tiny_pipelines import sdxl_pipeline

FEW_PROMPTS = ["a red seven", "a blue one"]
CLASSES = {
    "sd": (NullSpaceDreamBoothPipeline, StableDiffusionPipeline),
    "sdxl": (NullSpaceDreamBoothXLPipeline, StableDiffusionXLPipeline),
}


def load(pipeline_class: type, path: Path | str, **arguments):
    arguments.setdefault("dtype", torch.float32)
    pipeline = pipeline_class.from_pretrained(path, **arguments)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, prompt: str = "a red seven") -> torch.Tensor:
    return pipeline(prompt, num_inference_steps=2, output_type="pt", generator=torch.Generator().manual_seed(0)).images


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("base")
    sdxl_pipeline().save_pretrained(folder)
    return {"sd": MODEL_DIR, "sdxl": folder}


@pytest.fixture(scope="module")
def of_base(bases) -> dict[str, FeatureStatistics]:
    return {
        kind: collect_statistics(load(stock, bases[kind]), FEW_PROMPTS, expand_sub_phrases=False)
        for kind, (_, stock) in CLASSES.items()
    }


@pytest.fixture
def pipeline(bases, of_base):
    return load(NullSpaceDreamBoothPipeline, bases["sd"], statistics=of_base["sd"])


def lora(scale: float = 1.0, slot: str = "k", seed: int = 0) -> dict[str, torch.Tensor]:
    """A LoRA for one Linear of the digits model."""
    name = f"unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_{slot}"
    generator = torch.Generator().manual_seed(seed)
    wide = json.loads((MODEL_DIR / "unet" / "config.json").read_text())["block_out_channels"][-1]
    width = 128 if slot in "kv" else wide
    return {
        f"{name}.lora_A.weight": torch.randn(2, width, generator=generator),
        f"{name}.lora_B.weight": scale * torch.randn(wide, 2, generator=generator),
    }


@pytest.mark.parametrize("kind", CLASSES)
def test_a_plain_base_gives_the_pictures_of_the_stock_pipeline(bases, kind):
    ours, stock = CLASSES[kind]
    pipeline = load(ours, bases[kind])
    assert pipeline.statistics is None
    assert issubclass(ours, stock)
    assert draw(pipeline).equal(draw(load(stock, bases[kind])))
    pipeline.set_statistics(None)
    assert pipeline.components["statistics"] is None


@pytest.mark.parametrize("kind", CLASSES)
def test_statistics_are_a_component_that_is_saved_and_loaded(bases, of_base, kind, tmp_path):
    ours, stock = CLASSES[kind]
    pipeline = load(ours, bases[kind], statistics=of_base[kind])
    assert pipeline.components["statistics"] is of_base[kind]
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["statistics"] == ["diffusers_ext", "FeatureStatistics"]
    assert index["_class_name"] == ours.__name__
    loaded = load(ours, tmp_path)
    moment = loaded.statistics.moments[TEXT]
    assert moment.total.equal(of_base[kind].moments[TEXT].total)
    assert loaded.statistics.facts == of_base[kind].facts
    picture = draw(pipeline)
    assert draw(loaded).equal(picture)
    assert load(ours, tmp_path, statistics=None).statistics is None
    plain = load(stock, tmp_path)
    assert type(plain) is stock
    assert draw(plain).equal(picture)
    with loaded.preserve():
        assert draw(loaded).equal(picture)


def test_half_precision_copies_accept_their_statistics(bases, of_base, tmp_path):
    load(NullSpaceDreamBoothPipeline, bases["sd"], statistics=of_base["sd"]).save_pretrained(tmp_path)
    for dtype in (torch.float16, torch.bfloat16):
        loaded = load(NullSpaceDreamBoothPipeline, tmp_path, dtype=dtype)
        assert loaded.unet.dtype == dtype
        assert loaded.statistics.moments[TEXT].total.dtype == torch.float64


def test_statistics_load_from_a_folder(bases, of_base, tmp_path):
    of_base["sd"].save_pretrained(tmp_path / "deep")
    pipeline = load(NullSpaceDreamBoothPipeline, bases["sd"])
    pipeline.load_statistics(tmp_path, subfolder="deep")
    assert pipeline.statistics.facts == of_base["sd"].facts


def test_pipelines_are_made_of_one_another(bases, of_base):
    stock = load(StableDiffusionPipeline, bases["sd"])
    ours = NullSpaceDreamBoothPipeline.from_pipe(stock, statistics=of_base["sd"])
    assert ours.unet is stock.unet
    assert ours.statistics is of_base["sd"]
    assert StableDiffusionPipeline.from_pipe(ours).unet is stock.unet


def test_statistics_of_another_model_are_refused(bases, of_base, tmp_path, pipeline):
    other = collect_statistics(random_digits_pipeline(), FEW_PROMPTS)
    other.save_pretrained(tmp_path)
    message = "`statistics` must be of the same text_encoder, got another one"
    for use in (
        lambda: load(NullSpaceDreamBoothPipeline, bases["sd"], statistics=other),
        lambda: pipeline.set_statistics(other),
        lambda: pipeline.load_statistics(tmp_path),
    ):
        with pytest.raises(ValueError, match=message):
            use()
    models = {**of_base["sdxl"].facts["models"], **of_base["sd"].facts["models"]}
    facts = {**of_base["sdxl"].facts, "models": models}
    sdxl = FeatureStatistics(of_base["sdxl"].moments, {}, facts)
    with pytest.raises(ValueError, match="got some of a 'text_encoder_2', which NullSpaceDreamBo"):
        pipeline.set_statistics(sdxl)
    assert pipeline.statistics is of_base["sd"]
    with pytest.raises(TypeError, match="must be FeatureStatistics, got a str. Use `load_stat"):
        load(NullSpaceDreamBoothPipeline, bases["sd"], statistics=str(tmp_path))


def test_loras_are_loaded_as_in_diffusers(pipeline, bases):
    base = draw(pipeline)
    pipeline.load_lora_weights(lora(), "subject")  # the name may be positional
    assert pipeline.get_list_adapters() == {"unet": ["subject"]}
    stock = load(StableDiffusionPipeline, bases["sd"])
    stock.load_lora_weights(lora())
    picture = draw(stock)
    assert draw(pipeline).equal(picture)
    assert not picture.equal(base)
    pipeline.load_lora_weights(lora(seed=1), adapter_name="subject", hotswap=True)
    assert not draw(pipeline).equal(picture)
    pipeline.unload_lora_weights()
    assert draw(pipeline).equal(base)


@pytest.mark.parametrize(
    "bad", [lora(scale=0), {k.replace("unet", "unit"): t for k, t in lora().items()}], ids=["zero", "other names"]
)
@pytest.mark.parametrize("name", [None, "new"])
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_loras_without_effect_are_refused_and_removed(pipeline, bad, name):
    for count in range(3):
        if count:
            pipeline.load_lora_weights(lora(seed=count), adapter_name=f"works {count}")
        if count == 2:
            pipeline.set_adapters(["works 1", "works 2"], [0.5, 2.0])
        before = draw(pipeline)
        adapters, active = pipeline.get_list_adapters(), pipeline.get_active_adapters()
        with pytest.raises(ValueError, match="The loaded LoRA must change the model, got no effect"):
            pipeline.load_lora_weights(bad, adapter_name=name)
        assert pipeline.get_list_adapters() == adapters
        assert pipeline.get_active_adapters() == active
        assert draw(pipeline).equal(before)


def test_preserving_projects_what_is_loaded_and_stops_when_left(pipeline):
    base = {prompt: draw(pipeline, prompt) for prompt in (*FEW_PROMPTS, "a photo of sks")}
    pipeline.load_lora_weights(lora())
    plain = {prompt: draw(pipeline, prompt) for prompt in base}
    with pipeline.preserve(energy=0) as processor:
        for prompt in FEW_PROMPTS:
            assert (draw(pipeline, prompt) - base[prompt]).abs().max() < 1e-4
        assert (draw(pipeline, "a photo of sks") - base["a photo of sks"]).abs().max() > 1e-3
        processor.strength = 0
        assert draw(pipeline).equal(plain["a red seven"])
        processor.strength = 0.5
        half = (draw(pipeline) - base["a red seven"]).abs().mean()
        assert 0 < half < (plain["a red seven"] - base["a red seven"]).abs().mean()
    processors = dict(pipeline.unet.attn_processors)
    with pytest.raises(KeyboardInterrupt), pipeline.preserve():
        raise KeyboardInterrupt
    assert pipeline.unet.attn_processors == processors
    for prompt, picture in plain.items():
        assert draw(pipeline, prompt).equal(picture)


def test_the_default_is_a_damping_of_a_thousandth(pipeline, of_base):
    pipeline.load_lora_weights(lora())
    with pipeline.preserve():
        picture = draw(pipeline)
    projector = NullSpaceProjector.from_statistics(of_base["sd"], damping=1e-3)
    pipeline.set_statistics(None)
    with pipeline.preserve(projector=projector):
        assert draw(pipeline).equal(picture)
    with pytest.raises(ValueError, match="`statistics` must be loaded to preserve them, got none"):
        pipeline.preserve().__enter__()


def test_what_cannot_be_preserved_is_said(pipeline, caplog):
    pipeline.load_lora_weights({**lora(), **lora(slot="q")})
    with caplog.at_level(logging.WARNING, "diffusers_ext"), pipeline.preserve():
        pass
    (record,) = (r for r in caplog.records if r.name.startswith("diffusers_ext"))
    assert "1 modules of the loaded LoRAs are not projected" in record.getMessage()
    assert record.getMessage().endswith("attn2.to_q.")
    with pytest.raises(ValueError, match=r"`strength` must be in \[0, 1\], got 2"):
        pipeline.preserve(2).__enter__()
    pipeline.fuse_lora()
    with pytest.raises(ValueError, match="must not have its LoRA fused"), pipeline.preserve():
        draw(pipeline)


def test_a_pipeline_with_a_lora_refuses_to_be_saved_and_says_what_to_do(pipeline, tmp_path):
    add_random_lora(pipeline.unet)
    for save in (pipeline.save_pretrained, pipeline.push_to_hub):
        with pytest.raises(ValueError, match=r"got \['default'\] in its `unet`.*`save_lora`"):
            save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    pipeline.unload_lora_weights()
    plain = draw(pipeline)
    pipeline.save_pretrained(tmp_path / "saved")
    assert torch.equal(draw(load(NullSpaceDreamBoothPipeline, tmp_path / "saved")), plain)
