"""What ComfyUI makes of the LoRAs of transformers, by facts that were read in its public source.

`tests/fixtures/comfyui_lora_names.json` says in which files at which commits: of every model the modules that its map
of LoRA names has (`N` is the number of a block) and what may stand before them.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffusers_ext.core.sources import LORA_WEIGHT_NAME
from diffusers_ext.families import find_family
from diffusers_ext.families.lora_files import (
    COMFYUI_NAME,
    KOHYA_NAME,
    add_second_file,
    check_loaded_lora,
    export_lora,
    read_lora,
    second_file,
    write_lora,
)
from diffusers_ext.nullspace.lora_upload import push_lora
from diffusers_ext.nullspace.scope import scoped_linears
from diffusers_ext.nullspace.text_only import lora_name, text_only_linears, text_readers
from tests.tiny_current_pipelines import (
    tiny_auraflow_pipeline,
    tiny_flux2_pipeline,
    tiny_ltx2_pipeline,
    tiny_qwen_image_pipeline,
    tiny_wan_pipeline,
    tiny_z_image_pipeline,
)
from tests.tiny_image_pipelines import (
    tiny_chroma_pipeline,
    tiny_flux_pipeline,
    tiny_hunyuan_dit_pipeline,
    tiny_sd3_pipeline,
)

FACTS = json.loads((Path(__file__).parents[1] / "fixtures" / "comfyui_lora_names.json").read_text())
BUILD = {
    "sd3": tiny_sd3_pipeline,
    "flux": tiny_flux_pipeline,
    "flux2": tiny_flux2_pipeline,
    "chroma": tiny_chroma_pipeline,
    "auraflow": tiny_auraflow_pipeline,
    "qwen_image": tiny_qwen_image_pipeline,
    "z_image": tiny_z_image_pipeline,
    "wan": tiny_wan_pipeline,
    "ltx2": tiny_ltx2_pipeline,
}
OTHERS = {"wan", "ltx2"}  # whose modules it calls otherwise than diffusers


def known(name: str) -> re.Pattern[str]:
    """Of the keys that ComfyUI uses for a model."""
    entries = FACTS["models"][name]
    entries = FACTS["models"][entries] if isinstance(entries, str) else entries
    either = [
        f"(?:{'|'.join(map(re.escape, entry['prefixes']))})(?:{'|'.join(map(re.escape, entry['modules']))})"
        for entry in entries
    ]
    endings = "|".join(map(re.escape, FACTS["endings"]))
    return re.compile(rf"(?:{'|'.join(either)})(?:{endings})".replace("N", r"\d+"))


def lora_of(pipeline) -> dict[str, torch.Tensor]:
    """Of rank 1 on every Linear that an edit or any scope of a training may change."""
    trains = "nullspace" in find_family(pipeline).tools  # LTX-2 does not
    call = {} if trains else {"max_sequence_length": 16, "num_frames": 1, "height": 32, "width": 32}
    names = dict.fromkeys(text_only_linears(pipeline, **call))
    if trains:
        names |= dict.fromkeys(scoped_linears(pipeline, "all").names)
    lora, root, generator = {}, text_readers(pipeline), torch.Generator().manual_seed(0)
    for name in names:
        out_features, in_features = root.get_submodule(name).weight.shape
        written = lora_name(pipeline, name)
        lora[f"{written}.lora_A.weight"] = torch.randn(1, in_features, generator=generator)
        lora[f"{written}.lora_B.weight"] = torch.randn(out_features, 1, generator=generator)
    return lora


@pytest.mark.parametrize("name", BUILD)
def test_every_key_of_the_file_for_comfyui_is_in_its_map(name, tmp_path):
    pipeline, keys = BUILD[name](), known(name)
    lora = lora_of(pipeline)
    first = tmp_path / LORA_WEIGHT_NAME
    write_lora(lora, first)
    second = add_second_file(tmp_path, pipeline)
    strange = [key for key in lora if not keys.fullmatch(key)]
    if name not in OTHERS:  # there it is diffusers' own file
        assert second is None
        assert strange == []
        assert export_lora(lora, "comfyui", pipeline=type(pipeline)).keys() == lora.keys()
        return
    assert len(strange) == len(lora) if name == "wan" else strange
    assert second == tmp_path / COMFYUI_NAME
    written = load_file(second)
    assert len(written) == len(lora)
    assert [key for key in written if not keys.fullmatch(key)] == []
    assert sorted(x.sum().item() for x in written.values()) == sorted(x.sum().item() for x in lora.values())
    assert load_file(first).keys() == read_lora(first).keys() == lora.keys()


def test_diffusers_reads_the_names_of_wans_authors_as_those_it_wrote(tmp_path):
    pipeline = tiny_wan_pipeline()
    lora = lora_of(pipeline)
    pipeline.load_lora_weights(export_lora(lora, "comfyui", pipeline=pipeline))
    assert check_loaded_lora(pipeline) == len(lora) // 2
    others = ("condition_embedder.time_embedder.linear_1", "condition_embedder.time_proj", "blocks.0.ffn.net.0.proj")
    for name in (*others, "blocks.1.ffn.net.2", "proj_out"):
        lora |= {f"transformer.{name}.lora_A.weight": torch.ones(1, 2)}
        lora |= {f"transformer.{name}.lora_B.weight": torch.ones(2, 1)}
    written = export_lora(lora, "comfyui", tmp_path / "wan.safetensors", pipeline="WanPipeline")
    assert [key for key in written if not known("wan").fullmatch(key)] == []
    back = pipeline.lora_state_dict(tmp_path / "wan.safetensors")
    assert back.keys() == lora.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in lora.items())


def test_text_encoders_have_names_that_comfyui_knows():
    t5 = "encoder.block.0.layer"
    modules = [
        "text_encoder.text_model.encoder.layers.3.self_attn.q_proj",
        f"text_encoder_2.{t5}.0.SelfAttention.q", f"text_encoder_3.{t5}.1.DenseReluDense.wi_0",
        "transformer.context_embedder",
    ]  # fmt: skip
    lora = {f"{m}.lora_{part}.weight": torch.ones(1, 1) for m in modules for part in "AB"}
    family = find_family(tiny_flux_pipeline())
    assert second_file(lora, family) == COMFYUI_NAME
    keys, flux = known("text_encoders"), known("flux")
    written = export_lora(lora, "comfyui", pipeline="FluxPipeline")
    assert all(keys.fullmatch(key) or flux.fullmatch(key) for key in written)
    assert not all(keys.fullmatch(key) or flux.fullmatch(key) for key in lora)
    text = {key: tensor for key, tensor in lora.items() if key.startswith(("text_encoder.", "text_encoder_2."))}
    assert second_file(text, family) == KOHYA_NAME


def test_names_need_a_model_that_comfyui_reads():
    lora = {f"transformer.blocks.0.attn2.to_k.lora_{part}.weight": torch.ones(1, 1) for part in "AB"}
    for pipeline, told in ((None, "None"), (tiny_hunyuan_dit_pipeline, "'tiny_hunyuan_dit_pipeline'")):
        with pytest.raises(ValueError, match=f"`pipeline` must tell whose transformer the LoRA is of.* got {told}"):
            export_lora(lora, "comfyui", pipeline=pipeline)
    assert second_file(lora, None) == ""
    assert second_file(lora, find_family(tiny_hunyuan_dit_pipeline())) == ""


def test_an_upload_has_the_file_for_comfyui(hub, tmp_path):
    lora = {f"transformer.blocks.0.attn2.to_k.lora_{part}.weight": torch.ones(1, 1) for part in "AB"}
    write_lora(lora, tmp_path / LORA_WEIGHT_NAME)
    facts = {"instance_prompt": "a sks", "directions": "null", "trained_on": "Five pictures.", "license": "mit"}
    push_lora(tmp_path, "wan", pipeline="WanPipeline", base_model="user/base", **facts)
    files = hub.files("tester/wan")
    assert {COMFYUI_NAME, LORA_WEIGHT_NAME} < set(files)
    assert f"For ComfyUI take `{COMFYUI_NAME}`" in files["README.md"].decode()


FOREIGN = {
    "wan": ("diffusion_model.blocks.0.cross_attn.k", "transformer.blocks.0.attn2.to_k"),
    "qwen_image": (
        "diffusion_model.transformer_blocks.0.attn.add_k_proj",
        "transformer.transformer_blocks.0.attn.add_k_proj",
    ),
    "flux2": (
        "diffusion_model.transformer_blocks.0.attn.add_k_proj",
        "transformer.transformer_blocks.0.attn.add_k_proj",
    ),
    "z_image": ("diffusion_model.layers.0.attention.to_k", "transformer.layers.0.attention.to_k"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_names_of_other_programs_are_read_with_the_pipelines_class(name, tmp_path):
    foreign, own = FOREIGN[name]
    kind = find_family(BUILD[name]()).pipelines[0]
    a, b = torch.randn(2, 8), torch.randn(8, 2)
    lora = {f"{foreign}.lora_A.weight": a, f"{foreign}.lora_B.weight": b}
    with pytest.raises(ValueError, match="--pipeline"):
        read_lora(lora)
    found = read_lora(lora, kind)
    assert found.keys() == {f"{own}.lora_A.weight", f"{own}.lora_B.weight"}
    torch.testing.assert_close(found[f"{own}.lora_B.weight"] @ found[f"{own}.lora_A.weight"], b @ a)
    written = export_lora(lora, "diffusers", tmp_path / "lora.safetensors", pipeline=kind)
    assert read_lora(tmp_path / "lora.safetensors").keys() == written.keys()


def test_names_of_kohyas_scripts_are_read_with_the_pipelines_class():
    names = [f"{part}_attn_{one}" for part in ("self", "cross") for one in "qkvo"]
    names = {f"lora_unet_blocks_0_{one}": torch.randn(8, 2) for one in (*names, "ffn_0", "ffn_2")}
    lora = {f"{name}.lora_down.weight": b.T.clone() for name, b in names.items()}
    lora |= {f"{name}.lora_up.weight": b for name, b in names.items()}
    lora |= {f"{name}.alpha": torch.tensor(1.0) for name in names}
    found = read_lora(lora, "WanPipeline")
    assert len(found) == 2 * len(names)
    own, b = "transformer.blocks.0.attn2.to_k", names["lora_unet_blocks_0_cross_attn_k"]
    torch.testing.assert_close(found[f"{own}.lora_B.weight"] @ found[f"{own}.lora_A.weight"], b @ b.T / 2)
    del lora["lora_unet_blocks_0_self_attn_q.lora_down.weight"]
    with pytest.raises(ValueError, match="must name every module that diffusers expects of a LoRA of Wan"):
        read_lora(lora, "WanPipeline")
