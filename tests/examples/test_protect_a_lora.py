"""A LoRA is protected at several strictnesses, and the sheet shows them all."""

from __future__ import annotations

import pytest
from huggingface_hub import HfApi
from PIL import Image

from diffusers_ext import save_lora
from diffusers_ext.families.lora_files import read_lora
from examples.protect_a_lora import main
from tests.tiny_digits import random_digits_pipeline
from tests.tiny_lora import add_random_lora

NAME = "pytorch_lora_weights.safetensors"


@pytest.fixture
def arguments(hub, tmp_path) -> list[str]:
    pipeline = random_digits_pipeline()
    pipeline.save_pretrained(tmp_path / "model")
    add_random_lora(pipeline.unet)
    save_lora(type(pipeline), pipeline.unet, tmp_path / "lora")
    (tmp_path / "knowledge.txt").write_text("a red seven\na blue one\n")
    return [
        "--model", str(tmp_path / "model"), "--knowledge_prompts", str(tmp_path / "knowledge.txt"),
        "--prompt", "a sks", "--num_inference_steps", "2", "--strictness", "0.01", "100",
        "--output_dir", str(tmp_path / "out"),
    ]  # fmt: skip


def test_a_stricter_one_leaves_less_and_the_rest_is_kept(arguments, tmp_path):
    main([*arguments, "--lora", str(tmp_path / "lora")])
    before = read_lora(tmp_path / "lora")
    folders = (tmp_path / "out" / f"strictness_{value}" for value in ("0.01", "100"))
    loose, strict = (read_lora(folder / NAME) for folder in folders)
    assert before.keys() == loose.keys() == strict.keys()
    for key, tensor in before.items():
        if ".attn2.to_k." in key and "lora_A" in key:
            assert strict[key].norm() < loose[key].norm()
        elif ".attn1." in key:
            assert strict[key].equal(tensor)
    with Image.open(tmp_path / "out" / "sheet.png") as sheet:
        assert sheet.width > 4 * 96
        assert sheet.height > 3 * 96


def test_a_lora_of_the_hub_is_downloaded(arguments, tmp_path):
    HfApi().create_repo("tester/style")
    HfApi().upload_folder(repo_id="tester/style", folder_path=tmp_path / "lora")
    main([*arguments, "--lora", "tester/style"])
    assert (tmp_path / "out" / "strictness_100" / NAME).is_file()
