"""Erasers of pipelines with two transformers, each for timesteps of its own, in one folder."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline

from diffusers_ext.eraser.adapter.config import EraserConfig
from diffusers_ext.eraser.adapter.model import eraser_names
from diffusers_ext.eraser.files import load_eraser, save_eraser
from diffusers_ext.eraser.linear import convert_eraser_to_lora, merge_eraser, unmerge_eraser
from tests.tiny_cogvideox import tiny_transformer
from tests.tiny_current_pipelines import tiny_wan_pipeline
from tests.tiny_erasers import add_random_eraser

PARTS = ("transformer", "transformer_2")


@pytest.fixture(scope="module")
def one_expert() -> WanPipeline:
    return tiny_wan_pipeline()


@pytest.fixture
def two_experts(one_expert) -> WanPipeline:
    second = copy.deepcopy(one_expert.transformer)
    parts = {**one_expert.components, "transformer": copy.deepcopy(second), "transformer_2": second}
    pipeline = WanPipeline(**parts, boundary_ratio=0.5)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def erase(pipeline: WanPipeline, kind: str = "gelu") -> None:
    for seed, part in enumerate(PARTS):
        torch.manual_seed(seed)
        getattr(pipeline, part).add_adapter(EraserConfig(r=3, kind=kind, init_weights=False), "seven")


def clip(pipeline: WanPipeline) -> torch.Tensor:
    return pipeline(
        "a red seven",
        num_frames=1,
        height=32,
        width=32,
        num_inference_steps=3,
        guidance_scale=1.0,
        max_sequence_length=16,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).frames


def check_merge(pipeline: WanPipeline, erased: torch.Tensor) -> None:
    exact = clip(pipeline)
    assert merge_eraser(pipeline) == "seven"
    assert [eraser_names(getattr(pipeline, part)) for part in PARTS] == [[], []]
    torch.testing.assert_close(clip(pipeline), erased, rtol=1e-4, atol=1e-5)
    assert unmerge_eraser(pipeline, "seven") == "seven"
    assert torch.equal(clip(pipeline), exact)


def check_loras(pipeline: WanPipeline, folder: Path, erased: torch.Tensor) -> None:
    files = convert_eraser_to_lora(folder, folder / "lora")
    names = ("pytorch_lora_weights.safetensors", "comfyui.safetensors")
    assert files == [folder / "lora" / part / name for part in PARTS for name in names]
    for name in names:
        stock = WanPipeline(**pipeline.components, boundary_ratio=0.5)
        stock.transformer, stock.transformer_2 = (copy.deepcopy(getattr(pipeline, part)) for part in PARTS)
        stock.unload_lora_weights()
        stock.set_progress_bar_config(disable=True)
        for part, second in zip(PARTS, (False, True), strict=True):
            stock.load_lora_weights(folder / "lora" / part, weight_name=name, load_into_transformer_2=second)
        torch.testing.assert_close(clip(stock), erased, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["gelu", "linear"])
def test_one_folder_has_a_part_for_each_and_is_dialled_as_one(two_experts, tmp_path, kind):
    base = clip(two_experts)
    erase(two_experts, kind)
    erased = clip(two_experts)
    save_eraser(two_experts, tmp_path)
    files = ("adapter_config.json", "adapter_model.safetensors")
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")) == [
        f"{part}/{name}" for part in PARTS for name in files
    ]
    two_experts.unload_lora_weights()
    assert torch.equal(clip(two_experts), base)
    load_eraser(two_experts, tmp_path, adapter_name="seven")
    torch.testing.assert_close(clip(two_experts), erased, rtol=1e-4, atol=1e-5)
    if kind == "linear":
        check_loras(two_experts, tmp_path, erased)
        check_merge(two_experts, erased)
    two_experts.set_adapters("seven", 0.0)
    assert torch.equal(clip(two_experts), base)
    two_experts.set_adapters("seven", 1.0)
    two_experts.transformer_2.set_adapters("seven", 0.0)
    assert not torch.equal(clip(two_experts), erased)
    two_experts.delete_adapters("seven")
    assert torch.equal(clip(two_experts), base)


def test_half_an_eraser_is_not_merged(two_experts):
    erase(two_experts, "linear")
    two_experts.transformer_2.delete_adapters("seven")
    with pytest.raises(ValueError, match="`adapter_name` must name an eraser of the transformer, got 'seven'"):
        merge_eraser(two_experts, "seven")
    assert eraser_names(two_experts.transformer) == ["seven"]
    merge_eraser(two_experts.transformer)
    with pytest.raises(ValueError, match="merged last, None, got None"):
        unmerge_eraser(two_experts)


def test_a_part_is_loaded_into_one_transformer(two_experts, tmp_path):
    erase(two_experts)
    save_eraser(two_experts, tmp_path)
    two_experts.unload_lora_weights()
    load_eraser(two_experts.transformer_2, tmp_path, subfolder="transformer_2", adapter_name="low")
    assert (eraser_names(two_experts.transformer), eraser_names(two_experts.transformer_2)) == ([], ["low"])


def test_another_layout_or_family_is_refused_before_anything_changes(one_expert, two_experts, tmp_path):
    erase(two_experts)
    save_eraser(two_experts, tmp_path / "two")
    save_eraser(two_experts.transformer, tmp_path / "one")
    two_experts.unload_lora_weights()
    with pytest.raises(ValueError, match=r"an eraser for one transformer, got parts for \['transformer', 'transfo"):
        load_eraser(one_expert, tmp_path / "two")
    with pytest.raises(ValueError, match=r"a part for each of \['transformer', 'transformer_2'\], got an eras"):
        load_eraser(two_experts, tmp_path / "one")
    (tmp_path / "two" / "transformer_2" / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match=r"an eraser for the transformers .*, got parts for \['transformer'\]"):
        load_eraser(two_experts, tmp_path / "two")
    with pytest.raises(ValueError, match="of the transformer's family, got one of Wan for a CogVideoXTransformer3DM"):
        load_eraser(tiny_transformer(), tmp_path / "one")
    other = tiny_transformer()
    add_random_eraser(other)
    save_eraser(other, tmp_path / "cogvideox")
    with pytest.raises(ValueError, match="of the transformer's family, got one of CogVideoX for a WanTransformer3D"):
        load_eraser(one_expert, tmp_path / "cogvideox")
    assert not any(
        eraser_names(m) for m in (one_expert.transformer, two_experts.transformer, two_experts.transformer_2)
    )
