from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusers_ext.eraser.files import convert_eraser, load_eraser
from diffusers_ext.eraser.formats import FORMATS, read_eraser
from tests.eraser.saved_erasers import run, saved_eraser
from tests.tiny_cogvideox import tiny_transformer


def loaded_output(folder: Path) -> torch.Tensor:
    transformer = tiny_transformer()
    load_eraser(transformer, folder)
    return run(transformer)


@pytest.mark.parametrize(("given", "wanted"), [("peft", "legacy"), ("legacy", "peft")])
def test_the_other_format_acts_alike_to_the_bit(tmp_path, given, wanted):
    source = saved_eraser(tmp_path / "source", format=given)
    shape = convert_eraser(source, tmp_path / "other", wanted)
    assert shape == (32, 4, (0, 1))
    assert {path.name for path in (tmp_path / "other").iterdir()} == set(FORMATS[wanted])
    assert loaded_output(tmp_path / "other").equal(loaded_output(source))


def test_files_are_those_of_save_eraser(tmp_path):
    for format in FORMATS:
        source = saved_eraser(tmp_path / f"from_{format}", format=format)
        convert_eraser(source, tmp_path / f"to_{format}", format, base_model_name_or_path="x/y")
    for name in FORMATS["legacy"]:
        assert (tmp_path / "to_legacy" / name).read_bytes() == (tmp_path / "from_legacy" / name).read_bytes()
    weights = FORMATS["peft"][1]
    assert (tmp_path / "to_peft" / weights).read_bytes() == (tmp_path / "from_peft" / weights).read_bytes()
    configs = [json.loads((tmp_path / name / FORMATS["peft"][0]).read_text()) for name in ("from_peft", "to_peft")]
    assert configs[1] == {**configs[0], "base_model_name_or_path": "x/y"}


def test_a_legacy_eraser_gets_what_its_format_does_not_hold(tmp_path):
    source = saved_eraser(tmp_path / "legacy", format="legacy")
    convert_eraser(
        source, tmp_path / "peft", "peft",
        concept="dog", anchor_concept="cat", base_model_name_or_path="zai-org/CogVideoX-2b",
    )  # fmt: skip
    config = read_eraser(tmp_path / "peft").config
    assert (config.concept, config.anchor_concept) == ("dog", "cat")
    assert (config.in_features, config.num_layers) == (32, 2)
    assert config.base_model_name_or_path == "zai-org/CogVideoX-2b"
    facts = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert facts["auto_mapping"]["base_model_class"] == "CogVideoXTransformer3DModel"


def test_blocks_without_an_eraser_survive_the_legacy_format(tmp_path):
    source = saved_eraser(tmp_path / "source", layers_to_transform=[1])
    convert_eraser(source, tmp_path / "legacy", "legacy")
    assert loaded_output(tmp_path / "legacy").equal(loaded_output(source))


def test_bad_input_is_refused_and_leaves_nothing(tmp_path):
    source = saved_eraser(tmp_path / "source", layers_to_transform=[0])
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="`format` must be one of .*, got 'zip'"):
        convert_eraser(source, out, "zip")
    with pytest.raises(ValueError, match="must not hold an eraser of another format"):
        convert_eraser(source, source, "legacy")
    with pytest.raises(ValueError, match="no such folder"):
        convert_eraser(tmp_path / "nowhere", out, "peft")
    config, weights = source / "adapter_config.json", source / "adapter_model.safetensors"
    save_file(load_file(weights), weights)  # as of before there were digests
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_layers": None}))
    with pytest.raises(ValueError, match="`num_layers` of the eraser's config must be known"):
        convert_eraser(source, out, "legacy")
    assert not out.exists()


def test_an_eraser_without_effect_is_refused(tmp_path):
    source = saved_eraser(tmp_path / "source")
    path = source / "adapter_model.safetensors"
    save_file({name: tensor * ("down" in name) for name, tensor in load_file(path).items()}, path)
    with pytest.raises(ValueError, match="must have an effect, got '.*source' with zero"):
        convert_eraser(source, tmp_path / "out", "legacy")
    assert not (tmp_path / "out").exists()
