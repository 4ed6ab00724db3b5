from __future__ import annotations

import pytest

from diffusers_ext.training.nullspace import statistics as build_covariance
from examples.digits.check_model import load_pipeline
from tests.training.script_runs import files_below


def bad_prompts(folder, text: str) -> dict:
    (folder / "bad.txt").write_text(text)
    return {"knowledge_prompts": folder / "bad.txt"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda _: {"knowledge_prompts": "nowhere.txt"}, "got nowhere.txt: no such file"),
        (lambda f: bad_prompts(f, "# only\n\n"), "must hold at least one prompt, got .*bad.txt"),
        (lambda f: bad_prompts(f, "one two " * 9), r"must fit the tokenizer \(16 tokens\), got 20"),
        (lambda _: {"features": ["q", "w"]}, r"`features` must be among .*got \['w'\]"),
        (lambda _: {"cross_attention_layers": [0, 7]}, "indices from 0 to 6, got"),
        (lambda _: {"cross_attention_layers": ["mid"]}, "must be 'all' or indices, got"),
        (lambda _: {"num_inference_steps": 0}, "`num_inference_steps` must be at least 1, got 0"),
        (lambda _: {"statistics_batch_size": 0}, "`statistics_batch_size` must be at least 1"),
        (lambda _: {"num_attention_maps": 0}, "`num_attention_maps` must be at least 1, got 0"),
        (lambda _: {"nullspace_threshold": 0}, "`nullspace_threshold` must be positive, got 0"),
        (lambda _: {"compress": 1.5}, r"`compress` must be a share .* in \(0, 1\], got 1.5"),
        (lambda _: {"seed": -1}, "`seed` must be from 0 to .*, got -1"),
        (lambda _: {"resume_from_checkpoint": "latest"}, "got 'latest' but .*out holds none"),
        (lambda _: {"resume_from_checkpoint": "checkpoint-8"}, "must be 'latest' for statistics"),
    ],
)
def test_bad_input_is_refused_and_leaves_nothing(build, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        build("deep/out", **{"features": ["q", "k"], **arguments(tmp_path)})
    assert not (tmp_path / "deep/out").exists()


def test_features_that_are_not_finite(build, tmp_path, monkeypatch):
    def load_broken(*_):
        pipeline = load_pipeline()
        pipeline.unet.mid_block.attentions[0].proj_in.bias.data[3] = float("nan")
        return pipeline

    monkeypatch.setattr(build_covariance, "load_pipeline", load_broken)
    with pytest.raises(ValueError, match="attn2.to_q` must be finite, got a second moment"):
        build(features=["q", "k"])
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_is_a_file(build, prompts_file):
    with pytest.raises(ValueError, match="`output_dir` must be a folder, got .*knowledge.txt"):
        build(prompts_file.name)
    assert "a blue three" in prompts_file.read_text()


def test_a_failure_while_writing_leaves_the_old_result(build, tmp_path, monkeypatch):
    folder = build()
    before = {name: (folder / name).read_bytes() for name in files_below(folder)}

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("diffusers_ext.training.nullspace.statistics.plot_null_dimensions", fail)
    with pytest.raises(OSError, match="disk full"):
        build(seed=1, overwrite_output_dir=True)
    assert {name: (folder / name).read_bytes() for name in files_below(folder)} == before
    assert sorted(path.name for path in folder.iterdir()) == [
        ".result.json",
        "config.json",
        "model.safetensors",
        "plots",
        "report.json",
    ]
