from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPModel

from diffusers_ext.rewards.hpsv2 import check_weights, load_open_clip, map_open_clip, read_checkpoint, vit_h_14_config
from tests.rewards.hpsv2_fixtures import read_json, tiny_checkpoint, tiny_config


def mapping_by_the_table(weights, layers: dict[str, int]) -> dict[str, torch.Tensor]:
    """The fixture's table, carried out for `layers` of the two towers."""
    table = read_json("open_clip_to_transformers.json")
    rows = [tuple(row) for row in table["top_level"]]
    for tower in ("vision", "text"):
        for i in range(layers[tower]):
            old, new = (prefix.format(i=i) for prefix in table["blocks"][tower])
            for key, names, operation in table["blocks"]["inside"]:
                split = operation == "split3"
                rows.append((old + key, [new + n for n in names] if split else new + names, operation))
    found: dict[str, torch.Tensor] = {}
    for old, new, operation in rows:
        if operation == "split3":
            size = len(weights[old]) // 3
            found |= {n: weights[old][k * size : (k + 1) * size] for k, n in enumerate(new)}
        else:
            found[new] = weights[old].T if operation == "transpose" else weights[old]
    return found


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return tiny_checkpoint()


def test_every_tensor_goes_where_the_table_says(weights):
    found = map_open_clip(weights)
    expected = mapping_by_the_table(weights, {"vision": 2, "text": 2})
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(tensor.is_contiguous() for tensor in found.values())


def test_the_real_model_is_covered_one_for_one():
    fixture = read_json("vit_h_14_shapes.json")
    assert len(fixture["shapes"]) == 686
    with torch.device("meta"):
        checkpoint = {key: torch.empty(shape) for key, shape in fixture["shapes"].items()}
        model = CLIPModel(vit_h_14_config())
    assert sum(tensor.numel() for tensor in model.parameters()) == fixture["n_parameters"]
    mapped = map_open_clip(checkpoint)
    check_weights(mapped, model.state_dict())
    assert mapped.keys() == mapping_by_the_table(checkpoint, {"vision": 32, "text": 24}).keys()


def test_the_real_model_has_the_documented_structure():
    facts, config = read_json("open_clip_to_transformers.json")["hf_config"], vit_h_14_config()
    for tower in ("vision", "text"):
        found = getattr(config, f"{tower}_config")
        wanted = {**facts["real"][tower], "projection_dim": 1024}
        wanted |= {key: facts[key] for key in ("hidden_act", "layer_norm_eps")}
        assert {key: getattr(found, key) for key in wanted} == wanted
    assert config.projection_dim == facts["real"]["projection_dim"]
    assert config.text_config.eos_token_id == 49407


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", ["state_dict", "bare", "old format", "safetensors"])
def test_checkpoints_load_from_every_kind_of_file(weights, tmp_path, kind, dtype):
    path = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.pt")
    if kind == "safetensors":
        save_file(weights, path)
    else:
        content = weights if kind == "bare" else {"state_dict": weights, "epoch": 1}
        torch.save(content, path, _use_new_zipfile_serialization=kind != "old format")
    model = load_open_clip(path, tiny_config(), dtype)
    assert model.dtype == dtype
    expected, found = map_open_clip(weights), model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name].to(dtype)) for name in expected)
    assert model.vision_model.embeddings.position_ids.tolist() == [list(range(257))]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("visual.proj"), r"1 missing \['visual_projection.weight'\] and 0 surplus"),
        (lambda w: w.update(extra=torch.zeros(1)), "an open_clip CLIP model, got the key extra"),
        (
            lambda w: w.update({"transformer.resblocks.0.attn.bias_k": torch.zeros(1)}),
            "got the key transformer.resblocks.0.attn.bias_k",
        ),
        (
            lambda w: w.update({"transformer.resblocks.2.ln_1.weight": torch.zeros(64)}),
            r"0 missing \[\] and 1 surplus \['text_model.encoder.layers.2.layer_norm1.weight'\]",
        ),
        (
            lambda w: w.update({"visual.proj": torch.zeros(64, 31)}),
            r"`visual_projection.weight` must have shape \(32, 64\), got \(31, 64\)",
        ),
        (
            lambda w: w.update({"transformer.resblocks.0.attn.in_proj_bias": torch.zeros(2)}),
            "1 missing .*layers.0.self_attn.v_proj.bias",
        ),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(weights, tmp_path, change, message):
    changed = dict(weights)
    change(changed)
    torch.save(changed, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=message):
        load_open_clip(tmp_path / "weights.pt", tiny_config())


class Stranger:
    """Something that only a full unpickling could bring back."""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Stranger(), "must be a checkpoint of nothing but tensors"),
        ({"state_dict": {"a": Stranger()}}, "must be a checkpoint of nothing but tensors"),
        ({"state_dict": {"a": 1}}, "must hold a state dict, got dict with 'a' a int"),
        ([1, 2], "must hold a state dict, got list"),
    ],
)
def test_a_file_of_other_things_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=message):
        read_checkpoint(tmp_path / "weights.pt")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("kept", [0, 0.5, 0.99])
def test_a_truncated_file_is_refused(weights, tmp_path, suffix, kept):
    path = tmp_path / f"weights{suffix}"
    small = {"logit_scale": weights["logit_scale"], "visual.proj": weights["visual.proj"]}
    save_file(small, path) if suffix == ".safetensors" else torch.save(small, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(ValueError, match="may be truncated: download it again"):
        read_checkpoint(path)
