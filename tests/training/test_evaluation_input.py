from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file

from diffusers_ext.core.sources import LORA_WEIGHT_NAME
from tests.training.script_runs import EVALUATED, write_prompts


def lora_file(folder: Path, source: Path, change) -> Path:
    tensors = load_file(source / LORA_WEIGHT_NAME)
    save_file(change(tensors), folder / "changed.safetensors", metadata={"format": "pt"})
    return folder / "changed.safetensors"


def zero_b_matrices(tensors: dict) -> dict:
    return {key: t * 0 if "lora_B" in key else t for key, t in tensors.items()}


def other_names(tensors: dict) -> dict:
    return {key.replace("unet.", "transformer."): tensor for key, tensor in tensors.items()}


def wider(tensors: dict) -> dict:
    return {key: t.repeat(1, 2) if "lora_A" in key else t for key, t in tensors.items()}


@pytest.mark.parametrize("change", [zero_b_matrices, other_names, wider])
def test_loras_that_do_not_act_on_the_model_are_refused(evaluate, tmp_path, loras, change):
    path = lora_file(tmp_path, loras[0], change)
    with pytest.raises(ValueError, match="must be a LoRA for this model, got .*changed.safetens"):
        evaluate(lora=path)
    assert not (tmp_path / "out").exists()


def prompts_of(folder: Path, *prompts: str) -> Path:
    return write_prompts(folder / "other.txt", prompts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda _: {"lora": "nowhere"}, "must be a file, a folder or 'user/name', got nowhere"),
        (lambda _: {"knowledge_prompts": "nowhere.txt"}, "got nowhere.txt: no such file"),
        (lambda f: {"held_out_prompts": prompts_of(f)}, "must hold at least one prompt"),
        (lambda f: {"held_out_prompts": prompts_of(f, EVALUATED[1])}, "must not be among `prompts`"),
        (lambda _: {"judge": "tests.nowhere:judge"}, "`judge` must name a module"),
        (lambda _: {"judge": "tests.training.stub_judges:one_number"}, "one finite bool per image"),
        (
            lambda _: {"subject_judge": "tests.training.stub_judges:Always"},
            "`subject_prompts` must be given for a `subject_judge`",
        ),
        (lambda _: {"distribution": True}, "`distribution` must have features"),
        (lambda f: {"subject_data_dir": f}, "`subject_data_dir` must have features"),
        (
            lambda f: {"subject_data_dir": f / "x", "pixel_features": True},
            "`subject_data_dir` must be a folder of pictures",
        ),
        (lambda _: {"dino": "a/b", "pixel_features": True}, "`pixel_features` must not be given"),
        (lambda _: {"num_inference_steps": 0}, "`num_inference_steps` must be at least 1, got 0"),
        (lambda _: {"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        (lambda _: {"output_dir": __file__}, "`output_dir` must be a folder, got .*py"),
    ],
)
def test_bad_input_is_refused_and_leaves_nothing(evaluate, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate("out", **arguments(tmp_path))
    assert not (tmp_path / "out").exists()


def test_several_processes_are_refused(evaluate, tmp_path, monkeypatch):
    several = SimpleNamespace(num_processes=2)
    monkeypatch.setattr("diffusers_ext.training.run.setup.make_accelerator", lambda _: several)
    with pytest.raises(ValueError, match="must be one process, got 2. Pass `--num_processes 1`"):
        evaluate()
    assert not (tmp_path / "out").exists()
