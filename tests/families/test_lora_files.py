from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from diffusers_ext.core.lora_formats import check_lora_effect
from diffusers_ext.families.lora_files import adapter_metadata, check_loaded_lora, export_lora, read_lora
from diffusers_ext.nullspace.lora import lora_linears
from tests.tiny_digits import random_digits_pipeline
from tests.tiny_lora import ATTENTION_LINEARS, add_random_lora
from tests.tiny_pipelines import sdxl_pipeline

EVERYWHERE = (*ATTENTION_LINEARS, "proj_in", "ff.net.0.proj", "ff.net.2", "conv1")
NAME = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
TEXT = "text_encoder.encoder.layers.0.self_attn.q_proj"


def plain_lora(rank: int = 2, name: str = NAME) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"{name}.lora_A.weight": torch.randn(rank, 128, generator=generator),
        f"{name}.lora_B.weight": torch.randn(112, rank, generator=generator),
    }


def save_adapters(pipeline, folder: Path, **config) -> Path:
    """Random LoRAs on the UNet and the text encoders, written by diffusers."""
    layers, metadata = {}, {}
    add_random_lora(pipeline.unet, EVERYWHERE, **config)
    for index, name in enumerate(("unet", "text_encoder", "text_encoder_2")):
        model = getattr(pipeline, name, None)
        if model is None:
            continue
        if name != "unet":
            torch.manual_seed(index)
            targets = ["q_proj", "out_proj", "fc1"]
            lora = {"r": 2, "lora_alpha": 4, "init_lora_weights": False, "target_modules": targets}
            ranks = {"fc1": 3} if "rank_pattern" in config else {}
            model.add_adapter(LoraConfig(**lora, rank_pattern=ranks))
        layers[f"{name}_lora_layers"] = get_peft_model_state_dict(model, adapter_name="default")
        metadata[f"{name}_lora_adapter_metadata"] = model.peft_config["default"].to_dict()
    type(pipeline).save_lora_weights(folder, **layers, **metadata)
    return folder


def draw(pipeline) -> torch.Tensor:
    return pipeline(
        "a red seven", num_inference_steps=2, output_type="pt",
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    return save_adapters(random_digits_pipeline(), tmp_path_factory.mktemp("lora"))


def test_all_spellings_are_read_alike():
    a, b = plain_lora().values()
    for down, up in (
        ("lora_A", "lora_B"), ("lora.down", "lora.up"),
        ("lora_linear_layer.down", "lora_linear_layer.up"),
    ):  # fmt: skip
        read = read_lora({f"{NAME}.{up}.weight": b, f"{NAME}.{down}.weight": a})
        assert list(read) == [f"{NAME}.lora_A.weight", f"{NAME}.lora_B.weight"]
        assert read[f"{NAME}.lora_A.weight"] is a
        assert read[f"{NAME}.lora_B.weight"].equal(b)


def test_old_files_of_diffusers_hold_text_encoders_too(tmp_path):
    encoder = random_digits_pipeline().text_encoder
    encoder.add_adapter(LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    layers = get_peft_model_state_dict(encoder, adapter_name="default")
    StableDiffusionPipeline.save_lora_weights(
        tmp_path, text_encoder_lora_layers=convert_state_dict_to_diffusers(layers)
    )
    assert any("lora_linear_layer.up" in key for key in load_file(next(tmp_path.iterdir())))
    read = read_lora(tmp_path)
    assert {key.removeprefix("text_encoder.text_model."): t.sum() for key, t in read.items()} == {
        key.removeprefix("text_model."): tensor.sum()
        for key, tensor in layers.items()  # of transformers 4
    }


def test_alpha_tensors_are_folded_into_b():
    lora = plain_lora(rank=2)
    read = read_lora({**lora, f"{NAME}.alpha": torch.tensor(3.0)})
    assert read[f"{NAME}.lora_A.weight"].equal(lora[f"{NAME}.lora_A.weight"])
    assert read[f"{NAME}.lora_B.weight"].equal(lora[f"{NAME}.lora_B.weight"] * 1.5)
    assert len(read) == 2


@pytest.mark.parametrize(
    "config", [{}, {"use_rslora": True}, {"rank_pattern": {"to_k": 3}, "alpha_pattern": {"attn2.to_k": 9}}]
)
def test_scales_of_the_metadata_are_folded_into_b(tmp_path, config):
    pipeline = random_digits_pipeline()
    read = read_lora(save_adapters(pipeline, tmp_path, **config))
    layers = lora_linears(pipeline.unet)
    assert len(layers) == 70
    for name, layer in layers:
        a, b = read[f"unet.{name}.lora_A.weight"], read[f"unet.{name}.lora_B.weight"]
        torch.testing.assert_close(b @ a, layer.get_delta_weight("default"))
    for name, layer in lora_linears(pipeline.text_encoder):
        in_file = f"text_encoder.text_model.{name.removeprefix('text_model.')}"  # which transformers 4 says itself
        a, b = (read[f"{in_file}.lora_{part}.weight"] for part in "AB")
        torch.testing.assert_close(b @ a, layer.get_delta_weight("default"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({}, "`source` must hold a LoRA, got no tensors"),
        ({f"{NAME}.weight": 1}, r"must end in one of .*, got 'unet.mid.*to_k.weight'.$"),
        ({f"{NAME}.lora_magnitude_vector": 1}, "DoRA is not supported"),
        ({f"{NAME}.dora_scale": 1}, "DoRA is not supported"),
        ({f"{NAME}.lora_B.bias": 1}, r"must end in one of .*lora_B.bias"),
        (
            {f"{NAME}.lora_A.weight": 1},
            r"`source`: every module of a LoRA must have A and B, got \['A'\] for 'unet.mid",
        ),
    ],
)
def test_what_is_no_plain_lora_is_refused(source, message):
    with pytest.raises(ValueError, match=message):
        read_lora({key: torch.ones(2, 2) for key in source})


def test_missing_files_are_refused(tmp_path):
    (tmp_path / "lora.bin").write_bytes(b"")
    for path in (tmp_path, tmp_path / "none.safetensors", tmp_path / "lora.bin"):
        with pytest.raises(ValueError, match=rf"must be a .safetensors file .*, got {path}"):
            read_lora(path)


def test_loras_without_effect_are_refused():
    lora = plain_lora()
    check_lora_effect(lora)
    for part in lora:
        with pytest.raises(ValueError, match="must have an effect, got zero in every update"):
            check_lora_effect({**lora, part: torch.zeros(3)})
    with pytest.raises(ValueError, match="must have an effect"):
        export_lora({**lora, f"{NAME}.lora_B.weight": torch.zeros(112, 2)}, "kohya")


@pytest.mark.parametrize("build", [random_digits_pipeline, sdxl_pipeline])
@pytest.mark.parametrize("format", ["diffusers", "kohya"])
@pytest.mark.parametrize("config", [{}, {"rank_pattern": {"to_k": 3}}])
def test_exported_files_draw_the_same_pictures_in_stock_pipelines(tmp_path, build, format, config):
    trained = build()
    folder = save_adapters(trained, tmp_path, **config)
    lora = read_lora(folder)
    exported = export_lora(folder, format, tmp_path / "new" / "lora.safetensors")
    loaded = load_file(tmp_path / "new" / "lora.safetensors")
    assert loaded.keys() == exported.keys()
    weights = [key for key in exported if not key.endswith(".alpha")]
    assert len(weights) == len(lora)
    again = read_lora(tmp_path / "new" / "lora.safetensors")
    assert again.keys() == lora.keys()
    for key in lora:
        torch.testing.assert_close(again[key], lora[key])
    stock, base = build(), draw(build())
    stock.load_lora_weights(tmp_path / "new" / "lora.safetensors")
    assert check_loaded_lora(stock) == len(lora) // 2
    pictures = draw(trained)
    torch.testing.assert_close(draw(stock), pictures, rtol=0, atol=1e-5)
    assert (pictures - base).abs().max() > 0.05


def test_several_ranks_are_told_as_peft_reads_them():
    ranks = {"proj_out": 2, "blocks.0.proj_out": 3, "blocks.1.proj_out": 3}
    lora = {f"transformer.{name}.lora_A.weight": torch.ones(rank, 4) for name, rank in ranks.items()}
    told = json.loads(adapter_metadata(lora)["lora_adapter_metadata"])
    model = torch.nn.ModuleDict({"proj_out": torch.nn.Linear(4, 4)})
    model["blocks"] = torch.nn.ModuleList(torch.nn.ModuleDict({"proj_out": torch.nn.Linear(4, 4)}) for _ in range(2))
    config = LoraConfig(**{name.removeprefix("transformer."): value for name, value in told.items()})
    inject_adapter_in_model(config, model)
    for name, rank in ranks.items():
        layer = model.get_submodule(name)
        assert (layer.r["default"], layer.scaling["default"]) == (rank, 1.0)
    # One rank a component is read right without a word, and its file stays as it was.
    text = {f"{TEXT}.lora_A.weight": torch.ones(5, 4)}
    assert adapter_metadata({**plain_lora(), **text}) == {}


def test_kohya_names_are_those_that_other_programs_know(tmp_path):
    two = {**plain_lora(), **plain_lora(name=TEXT), **plain_lora(name=TEXT.replace("er.", "er_2.", 1))}
    assert {key.split(".")[0] for key in export_lora(two, "kohya")} == {
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k",
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
        "lora_te2_text_model_encoder_layers_0_self_attn_q_proj",
    }
    one = export_lora(plain_lora(name=TEXT.replace(".enc", ".text_model.enc", 1)), "kohya")
    name = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    assert set(one) == {f"{name}.lora_down.weight", f"{name}.lora_up.weight", f"{name}.alpha"}
    assert one[f"{name}.alpha"].item() == 2


def test_keys_without_a_kohya_counterpart_are_refused(tmp_path):
    lora = {**plain_lora(), **plain_lora(name="transformer.blocks.0.attn2.to_k")}
    with pytest.raises(ValueError, match=r"must have a kohya counterpart, .*\['transformer_blocks"):
        export_lora(lora, "kohya", tmp_path / "lora.safetensors")
    assert not list(tmp_path.iterdir())


def test_formats_and_paths_are_checked_first(tmp_path):
    with pytest.raises(ValueError, match=r"`format` must be one of \('diffusers', 'kohya', 'comfyui'\), got 'x"):
        export_lora(tmp_path, "xl")
    with pytest.raises(ValueError, match=f"`output_path` must end in .safetensors, got {tmp_path}"):
        export_lora(plain_lora(), output_path=tmp_path)


def test_files_without_metadata_have_scale_one(trained, tmp_path):
    path = tmp_path / "lora.safetensors"
    save_file(plain_lora(), path)
    assert all(tensor.equal(plain_lora()[key]) for key, tensor in read_lora(path).items())


def test_loaded_loras_are_checked_for_an_effect(trained):
    pipeline = random_digits_pipeline()
    with pytest.raises(ValueError, match=r"must change the model, got no effect \(adapter: None\)"):
        check_loaded_lora(pipeline)
    pipeline.load_lora_weights(trained, adapter_name="subject")
    count = len(read_lora(trained)) // 2
    assert check_loaded_lora(pipeline) == check_loaded_lora(pipeline, "subject") == count
    with pytest.raises(ValueError, match=r"got no effect \(adapter: 'other'\)"):
        check_loaded_lora(pipeline, "other")
    for name, parameter in pipeline.unet.named_parameters():
        if ("lora_A" if "attn1" in name else "lora_B") in name:
            parameter.data.zero_()
    in_text = len(lora_linears(pipeline.text_encoder, "subject"))
    assert check_loaded_lora(pipeline, "subject") == in_text > 0
