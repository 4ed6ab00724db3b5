from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler
from safetensors import safe_open
from safetensors.torch import load_file
from torch.utils.data import TensorDataset

from diffusers_ext.nullspace.step import DreamBoothLoss
from diffusers_ext.training.nullspace.data import (
    caption_facts,
    encode_condition,
    encode_conditions,
    picture_prompts,
    read_captions,
    subject_prompts,
    with_prompts,
)
from diffusers_ext.training.nullspace.run import check_args, parse_args
from tests.tiny_pipelines import sdxl_pipeline
from tests.training.test_dreambooth import Echo

LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture
def folder(pictures, tmp_path) -> Path:
    """The pictures `0.png`, `1.png` and `2.png`, to put captions beside."""
    return Path(shutil.copytree(pictures, tmp_path / "captioned"))


def write_table(folder: Path, kind: str, rows: dict[str, str]) -> None:
    if kind == "text":
        for name, text in rows.items():
            folder.joinpath(name).with_suffix(".txt").write_text(text)
    elif kind == "jsonl":
        lines = [json.dumps({"file_name": name, "text": text}) for name, text in rows.items()]
        (folder / "metadata.jsonl").write_text("\n".join(lines))
    else:
        lines = ["file_name,text", *(f"{name},{text}" for name, text in rows.items())]
        (folder / "metadata.csv").write_text("\n".join(lines))


def lora(folder: Path) -> bytes:
    return (folder / LORA).read_bytes()


@pytest.mark.parametrize("kind", ["text", "jsonl", "csv"])
def test_captions_of_every_source(folder, subject_line, kind):
    write_table(folder, kind, {"0.png": "a red sks\n", "2.png": "a white sks"})
    assert read_captions(folder) == {"0.png": "a red sks", "2.png": "a white sks"}
    args = parse_args(subject_line(instance_data_dir=folder))
    assert picture_prompts(args) == ["a red sks", "a white sks", "a white sks"]
    assert subject_prompts(args) == ["a white sks", "a red sks"]


def test_hidden_files_and_other_names(folder):
    (folder / "._0.txt").write_bytes(b"\0\1")
    (folder / "0.TXT").write_text("a red\nsks\n")
    assert read_captions(folder) == {"0.png": "a red sks"}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"notes.txt": "hello"}, r"in .*notes.txt must be of a picture in .*, got 'notes', which"),
        ({"0.txt": " \n"}, r"The caption of '0.png' in .*0.txt must not be empty"),
        ({"0.txt": "a", "0.caption": "b"}, r"0.png must have one caption, got two: in .* and in "),
        ({"metadata.csv": "file_name,text\n9.png,a\n"}, r"line 2 of .*csv must be of .* got '9.png'"),
        ({"metadata.csv": "file_name,text\n0.png,\n"}, r"'0.png' in line 2 of .*csv must not be empty"),
        (
            {"metadata.csv": "file_name,text\n0.png,a\n0.png,b\n"},
            r"0.png must have one caption, got two: in line 2 of .* and in line 3 of ",
        ),
        ({"metadata.csv": "file_name,text\n0.png,a\n", "0.txt": "b"}, "one caption, got two"),
        ({"metadata.csv": "file_name,label\n0.png,a\n"}, r"metadata.csv must have the column 'text'"),
        ({"metadata.jsonl": "0.png\n"}, r"line 1 of .*metadata.jsonl must hold JSON"),
    ],
)  # fmt: skip
def test_bad_captions_stop_before_the_model_is_loaded(folder, subject_line, files, message):
    for name, text in files.items():
        (folder / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        check_args(parse_args(subject_line(instance_data_dir=folder)))


def test_every_sample_has_the_condition_of_its_picture():
    pipeline, prompts = sdxl_pipeline(), ["a", "a b", "a b c"]
    condition = encode_conditions(pipeline, prompts)
    for row, prompt in enumerate(prompts):
        alone = encode_condition(pipeline, prompt)
        for name, tensor in condition.text.tensors().items():
            assert torch.equal(tensor[row], alone.text.tensors()[name][0])
    mirrored = TensorDataset(torch.zeros(4, 4, 8, 8), torch.ones(4, 4, 8, 8))
    dataset = with_prompts(mirrored, ["a b c", "a"], prompts)
    assert dataset.tensors[2].tolist() == [2, 2, 0, 0]
    model, loss = Echo(), DreamBoothLoss(DDPMScheduler(), condition)
    loss(model, list(dataset[1:4]), torch.Generator().manual_seed(0))
    assert torch.equal(model.seen[0]["embeds"], condition.text.prompt_embeds[[2, 0, 0]])
    added = model.seen[0]["added"]
    assert torch.equal(added["text_embeds"], condition.text.pooled_prompt_embeds[[2, 0, 0]])
    assert added["time_ids"].shape == (3, 6)


def test_captions_train_and_say_so(teach, folder, caplog):
    plain = teach("without", instance_data_dir=folder)
    assert "caption" not in caplog.text
    write_table(folder, "text", {"0.png": "a red sks", "1.png": "a blue seven"})
    with caplog.at_level(logging.INFO):
        captioned = teach("with", instance_data_dir=folder)
    assert "2 of 3 pictures are trained with captions of their own, from text files" in caplog.text
    assert "1 captions (1.png, ...) lack 'sks'" in caplog.text
    assert "lack 'a'" not in caplog.text
    assert lora(captioned) != lora(plain)
    with safe_open(captioned / LORA, "pt") as file:
        counts = json.loads(file.metadata()["ss_tag_frequency"])["instance"]
    assert counts == {"a red sks": 1, "a blue seven": 1, "a white sks": 1}


def test_captions_like_the_instance_prompt_change_nothing(teach, folder):
    plain = load_file(teach("without", instance_data_dir=folder, max_train_steps=2) / LORA)
    write_table(folder, "jsonl", {"0.png": "a white sks"})
    same = load_file(teach("with", instance_data_dir=folder, max_train_steps=2) / LORA)
    for name, tensor in plain.items():  # but for the order in which floats are summed
        torch.testing.assert_close(same[name], tensor, rtol=1e-3, atol=1e-5)


def test_a_run_goes_on_with_the_same_captions_alone(teach, folder, subject_line):
    assert not caption_facts(parse_args(subject_line(instance_data_dir=folder)))
    write_table(folder, "csv", {"0.png": "a red sks"})
    run = {"instance_data_dir": folder, "checkpointing_steps": 1, "max_train_steps": 2}
    teach(**run)
    resume = {**run, "resume_from_checkpoint": "latest", "max_train_steps": 3}
    write_table(folder, "csv", {"0.png": "a blue sks"})
    with pytest.raises(ValueError, match="`captions` must be the same to continue"):
        teach(**resume)
    (folder / "metadata.csv").unlink()
    with pytest.raises(ValueError, match="`captions` must be the same to continue"):
        teach(**resume)
    write_table(folder, "csv", {"0.png": "a red sks"})
    teach(**resume)


def test_files_that_are_not_read_are_named(teach, folder, caplog):
    (folder / "metadata.parquet").write_bytes(b"PAR1")
    teach(instance_data_dir=folder, max_train_steps=1)
    assert "metadata.parquet may hold captions and is not read" in caplog.text
