from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from diffusers_ext.nullspace.lora_files import export_lora, read_lora, write_lora


NAMES = ("unet.a.lora_A.weight", "unet.a.lora_B.weight", "unet.a.alpha")
KOHYA = ("lora_unet_mid_block_attentions_0_proj_in.lora_down.weight",
         "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight",
         "lora_unet_mid_block_attentions_0_proj_in.alpha")  # fmt: skip


def test_a_damaged_lora_is_refused(tmp_path):
    for name, tensors in {
        "nan": {"unet.a.lora_A.weight": torch.full((1, 4), float("nan")),
                "unet.a.lora_B.weight": torch.ones(4, 1)},
        "rank": {"unet.a.lora_A.weight": torch.ones(1, 4), "unet.a.lora_B.weight": torch.ones(4, 2)},
    }.items():  # fmt: skip
        save_file(tensors, tmp_path / f"{name}.safetensors")
        with pytest.raises(ValueError, match=name):  # the message names the file
            export_lora(tmp_path / f"{name}.safetensors", output_path=tmp_path / "o.safetensors")
    assert not (tmp_path / "o.safetensors").exists()


@pytest.mark.parametrize("names", [NAMES, KOHYA])
@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((torch.ones(1, 4),), "must have A and B"),
        ((torch.ones(2, 4), torch.ones(4, 1)), "must have one rank"),
        ((torch.ones(0, 4), torch.ones(4, 0)), "must have one rank"),
        ((torch.ones(4), torch.ones(4)), "must both be of a Linear"),
        ((torch.ones(1, 4, 1, 1), torch.ones(4, 1)), "must both be of a Linear"),
        ((torch.ones(1, 4, 3, 3), torch.ones(4, 1, 3, 3)), "must be 1 x 1"),
        ((torch.ones(1, 4).int(), torch.ones(4, 1)), "in float16 or .*, got int32"),
        ((torch.ones(1, 4), torch.full((4, 1), float("inf"))), "must hold finite numbers"),
        ((torch.ones(1, 4), torch.ones(4, 1), torch.ones(2)), "alpha must be one number"),
        ((torch.ones(1, 4), torch.ones(4, 1), torch.tensor(float("nan"))), "finite numbers"),
        (
            (torch.ones(1, 4).half(), torch.full((4, 1), 6e4).half(), torch.tensor(4.0)),
            "B times its scale 4 must be finite",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_file(tmp_path, names, parts, message):
    file = tmp_path / "damaged.safetensors"
    save_file(dict(zip(names, parts)), file)
    with pytest.raises(ValueError, match=f"damaged.safetensors.*{message}"):
        read_lora(file)


def test_convolutions_are_read(tmp_path):
    a, b = torch.ones(2, 4, 3, 3), torch.ones(8, 2, 1, 1)
    assert len(read_lora(dict(zip(NAMES, (a, b))))) == 2


def test_two_spellings_of_one_module_are_refused():
    pair = dict(zip(NAMES, (torch.ones(1, 4), torch.ones(4, 1))))
    for second in ("unet.a.lora.down.weight", "base_model.model.a.lora_A.weight"):
        with pytest.raises(ValueError, match=f"one A for every module, .* as '{second}'"):
            read_lora({**pair, second: torch.zeros(1, 4)})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("[" * 100_000, "must hold JSON"),
        ("{", "must hold JSON"),
        ("[1]", "must hold a JSON object"),
        ({"unet.lora_alpha": "2"}, "finite number as 'unet.lora_alpha', got '2'"),
        ({"unet.lora_alpha": float("nan")}, "finite number"),
        ({"unet.alpha_pattern": ["a"]}, "names and numbers as 'unet.alpha_pattern'"),
        ({"unet.alpha_pattern": {"(a+)+!": 1}}, "must hold module names .* pattern"),
        ({"unet.alpha_pattern": {"a": True}}, "finite number"),
        ({"unet.r": 4}, "the rank of 'a' must be 4 as in the file's metadata, got 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused_by_file(tmp_path, settings, message):
    file = tmp_path / "damaged.safetensors"
    text = settings if isinstance(settings, str) else json.dumps(settings)
    pair = dict(zip(NAMES, (torch.ones(1, 4), torch.ones(4, 1))))
    save_file(pair, file, metadata={"lora_adapter_metadata": text})
    with pytest.raises(ValueError, match=f"damaged.safetensors.*{message}"):
        read_lora(file)


def test_what_was_altered_after_writing_is_found(tmp_path):
    file = tmp_path / "mine.safetensors"
    write_lora(dict(zip(NAMES, (torch.ones(1, 4), torch.ones(4, 1)))), file)
    content = bytearray(file.read_bytes())
    content[-3] ^= 1  # still finite, of the same shape
    file.write_bytes(content)
    with pytest.raises(ValueError, match="mine.safetensors must have the contents"):
        read_lora(file)
