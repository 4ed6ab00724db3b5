from __future__ import annotations

import argparse
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from PIL import Image

from examples.digits.check_model import load_pipeline
from training import publish as publish_module
from training.publish import (
    Validation,
    make_repository,
    publish,
    publish_statistics,
    statistics_card,
    subject_card,
)
from training.train_nullspace_dreambooth import main, parse_args


STATISTICS = SimpleNamespace(facts={"prompts": ["a red one", "a blue two"]})


@pytest.fixture
def make_args(subject_line):
    def make(**arguments) -> argparse.Namespace:
        arguments = {"validation_prompt": "a red seven", "num_validation_images": 2, **arguments}
        return parse_args(subject_line(**arguments))

    return make


class Hub:
    """Stands for the Hub: remembers what was asked of it."""

    calls: list[tuple[str, dict]] = []

    def __init__(self, token=None) -> None:
        self.token = token

    def create_repo(self, name: str, **options):
        self.calls.append(("create", {"name": name, "token": self.token, **options}))
        return SimpleNamespace(repo_id=f"somebody/{name}")

    def upload_folder(self, **options):
        self.calls.append(("upload", {"token": self.token, **options}))
        return "https://huggingface.co/commit"


@pytest.fixture
def hub(monkeypatch, fresh_accelerator):
    Accelerator(cpu=True)  # its logger asks for one
    monkeypatch.setattr(publish_module, "HfApi", Hub)
    monkeypatch.setattr(Hub, "calls", [])
    return Hub


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline()


@pytest.fixture
def validation(make_args, pipeline, fresh_accelerator):
    return Validation(make_args(), pipeline, Accelerator(cpu=True))


def read(path) -> np.ndarray:
    with Image.open(path) as file:
        return np.asarray(file)


def test_pictures_have_fixed_seeds(validation, tmp_path):
    ((every, draw),) = validation.callbacks()
    assert every == validation.args.max_train_steps
    draw(3)
    torch.randn(5)
    draw(7)
    names = ["step-000003-prompt-0.png", "step-000007-prompt-0.png"]
    folder = tmp_path / "out" / "validation"
    assert [path.name for path in sorted(folder.iterdir())] == names
    assert validation.files == [folder / names[1]]
    first, second = (read(folder / name) for name in names)
    assert first.shape == (32, 64, 3)
    assert np.array_equal(first, second)
    assert not np.array_equal(first[:, :32], first[:, 32:])


def test_no_prompts_no_callback(make_args, pipeline, fresh_accelerator):
    accelerator = Accelerator(cpu=True)
    assert Validation(make_args(validation_prompt=None), pipeline, accelerator).callbacks() == []
    args = make_args(validation_steps=5)
    assert Validation(args, pipeline, accelerator).callbacks()[0][0] == 5


@pytest.mark.parametrize("broken", [False, True])
def test_the_model_is_left_as_it_was(validation, pipeline, monkeypatch, broken):
    pipeline.unet.train()
    pipeline.unet.up_blocks.eval()
    modes = [module.training for module in pipeline.unet.modules()]
    state = torch.get_rng_state()
    seen = []
    hook = pipeline.unet.conv_in.register_forward_hook(
        lambda module, *_: seen.append(module.training)
    )
    try:
        if broken:
            monkeypatch.setattr(pipeline.vae, "decode", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                validation.draw(1)
        else:
            validation.draw(1)
    finally:
        hook.remove()
        restored = [module.training for module in pipeline.unet.modules()]
        pipeline.unet.eval()
    assert not any(seen)
    assert restored == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_tensorboard_gets_the_pictures(validation):
    added = []
    writer = SimpleNamespace(add_images=lambda *args, **options: added.append((args, options)))
    validation.accelerator.trackers = [
        SimpleNamespace(name="tensorboard", writer=writer),
        SimpleNamespace(name="other"),
    ]
    validation.draw(9)
    ((name, stacked, step), options) = added[0]
    assert (name, step, options) == ("a red seven", 9, {"dataformats": "NHWC"})
    assert stacked.shape == (2, 32, 32, 3)
    assert np.array_equal(np.concatenate(stacked, axis=1), read(validation.files[0]))


def header_of(card) -> dict:
    return yaml.safe_load(str(card).split("---")[1])


def test_the_card_of_a_lora(make_args, tmp_path):
    args = make_args(pretrained_model_name_or_path="somebody/base", rank=3, hub_token="secret")
    card = subject_card(args, "me/subject", [tmp_path / "out" / "validation" / "last.png"])
    header = header_of(card)
    assert header["base_model"] == "somebody/base"
    assert header["instance_prompt"] == "a white sks"
    assert header["library_name"] == "diffusers"
    assert {"lora", "null-space-lora", "dreambooth"} <= set(header["tags"])
    assert header["widget"] == [{"text": "a red seven", "output": {"url": "validation/last.png"}}]
    assert "`generalized` directions of rank 3" in card.text
    assert 'pipeline.load_lora_weights("me/subject")' in card.text
    for left_over in ("{{", "{%", "TODO", "secret"):
        assert left_over not in str(card)


def test_cards_of_other_kinds(make_args):
    plain = subject_card(make_args(directions="plain"), "me/subject", [])
    header = header_of(plain)
    assert "null-space-lora" not in header["tags"]
    assert "base_model" not in header  # a folder here is nothing on the Hub
    assert "widget" not in header
    assert "unconstrained LoRA" in plain.text
    full = subject_card(make_args(full_finetune=True), "me/subject", [])
    assert "lora" not in header_of(full)["tags"]
    assert 'DiffusionPipeline.from_pretrained("me/subject")' in full.text
    statistics = statistics_card(make_args(), "me/statistics", STATISTICS)
    assert "for 2 prompts" in statistics.text
    assert 'FeatureStatistics.from_pretrained("me/statistics")' in statistics.text


def test_private_files_stay_here(make_args, hub, tmp_path, pipeline):
    out = tmp_path / "out"
    args = make_args(
        hub_token="secret", hub_model_id="subject", hub_private_repo=True,
        instance_data_dir=out / "photos", class_data_dir=out / "prior" / "dogs",
    )  # fmt: skip
    out.mkdir()
    assert publish(args, pipeline, []) == "https://huggingface.co/commit"
    (_, created), (_, uploaded) = hub.calls
    assert created == {"name": "subject", "token": "secret", "private": True, "exist_ok": True}
    assert (uploaded["repo_id"], uploaded["token"]) == ("somebody/subject", "secret")
    assert str(uploaded["folder_path"]) == str(out)
    for pattern in ("checkpoint-*", ".partial-*", "logs/*", "photos/*", "prior/dogs/*"):
        assert pattern in uploaded["ignore_patterns"]
    assert "somebody/subject" in (out / "README.md").read_text()


def test_a_pipeline_goes_where_from_pretrained_looks_for_it(make_args, hub, tmp_path, pipeline):
    (tmp_path / "out").mkdir()
    publish(make_args(full_finetune=True), pipeline, [])
    uploads = [options for kind, options in hub.calls if kind == "upload"]
    assert uploads[0]["folder_path"] == tmp_path / "out" / "pipeline"
    assert "pipeline/*" in uploads[1]["ignore_patterns"]


def test_statistics_are_published_without_what_is_hidden(make_args, hub, tmp_path):
    (tmp_path / "out").mkdir()
    publish_statistics(make_args(), STATISTICS)
    assert hub.calls[0][1]["name"] == "out"
    assert hub.calls[1][1]["ignore_patterns"] == [".*", "progress/*"]


def test_the_repository_is_named_after_the_folder(make_args, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = make_args()
    args.output_dir = "."
    assert make_repository(args) == f"somebody/{tmp_path.name}"


def test_a_missing_login_stops_a_run_before_it_begins(
    subject_line, hub, tmp_path, monkeypatch, fresh_accelerator
):
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("401: log in first")

    monkeypatch.setattr(hub, "create_repo", refuse)
    monkeypatch.setattr("training.train_nullspace_dreambooth.load_pipeline", None)
    with pytest.raises(PermissionError, match="log in first"):
        main(parse_args(subject_line(push_to_hub=True)))
    assert not (tmp_path / "out").exists()


def test_a_run_is_published_at_its_end(teach, hub):
    folder = teach(push_to_hub=True, hub_token="secret", max_train_steps=1)
    assert [kind for kind, _ in hub.calls] == ["create", "create", "upload"]
    assert "secret" not in (folder / "training_report.json").read_text()
    assert "secret" not in (folder / "README.md").read_text()


def test_a_token_is_not_given_to_wandb(subject_line, capsys):
    with pytest.raises(SystemExit):
        parse_args(subject_line(report_to="wandb", hub_token="secret"))
    error = capsys.readouterr().err
    assert "`--hub_token` must not be used with `--report_to wandb`" in error
    assert "secret" not in error
