from __future__ import annotations

import argparse
import json

import pytest
from accelerate import Accelerator
from huggingface_hub import ModelCard
from PIL import Image

from diffusers_ext.core.sources import LORA_WEIGHT_NAME
from diffusers_ext.nullspace.collect import collect_statistics
from diffusers_ext.nullspace.statistics import FeatureStatistics
from diffusers_ext.training.nullspace.run import main, parse_args
from diffusers_ext.training.nullspace.statistics import collection_card
from diffusers_ext.training.nullspace.subject import publish, subject_card
from diffusers_ext.training.run.script import (
    card_arguments,
    check_login,
    left_here,
    prepare_upload,
    push_output,
    repository_name,
    upload_arguments,
)
from examples.digits.check_model import load_pipeline
from tests.golden_noise.shared_facts import upload_base


@pytest.fixture
def make_args(subject_line):
    def make(**arguments) -> argparse.Namespace:
        arguments = {"validation_prompt": "a red seven", "hub_license": "mit", **arguments}
        return parse_args(subject_line(**arguments))

    return make


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline()


@pytest.fixture(scope="module")
def statistics(pipeline) -> FeatureStatistics:
    return collect_statistics(pipeline, ["a red one", "a blue two"], expand_sub_phrases=False)


@pytest.fixture
def accelerator(fresh_accelerator) -> Accelerator:
    return Accelerator(cpu=True)  # the script's logger asks for one


def card_of(hub, repo_id: str) -> ModelCard:
    return ModelCard(hub.files(repo_id)["README.md"].decode())


def test_the_card_of_a_lora(make_args, pipeline, statistics, tmp_path):
    args = make_args(hub_base_model="somebody/base", rank=3, learning_rate=0.25)
    picture = tmp_path / "out" / "validation" / "last.png"
    report = {"predicted_drift": {"a": 0.5, "b": 0.25}}
    card = subject_card(args, pipeline, statistics, report, [picture])("me/subject")
    assert card.data.base_model == "somebody/base"
    assert card.data.instance_prompt == "a white sks"
    assert {"lora", "null-space-lora", "dreambooth"} <= set(card.data.tags)
    assert card.data.widget == [{"text": "a red seven", "output": {"url": "validation/last.png"}}]
    assert card.data.eval_results[0].metric_value == 0.375
    assert "3 pictures of the subject at 32 x 32 pixels" in card.text
    assert "for 2 prompts was preserved" in card.text
    assert "| 0.25 |" in card.text
    assert str(tmp_path) not in str(card)


def test_cards_of_other_kinds(make_args, pipeline, tmp_path):
    plain = subject_card(make_args(directions="plain"), pipeline)("me/subject")
    assert "null-space-lora" not in plain.data.tags
    assert plain.data.base_model is None  # a folder here is nothing on the Hub
    assert "widget" not in plain.data.to_dict()
    prior = {"with_prior_preservation": True, "class_data_dir": tmp_path, "class_prompt": "a dog"}
    full = subject_card(make_args(full_finetune=True, **prior), pipeline)("me/subject")
    assert "lora" not in full.data.tags
    assert "100 pictures of its class" in full.text
    known = collection_card(make_args(), pipeline, ["a red one", "a blue two"])
    assert "a red one" in known("me/statistics").text


def test_private_files_stay_here(hub, accelerator, make_args, pipeline, tmp_path):
    out = tmp_path / "out"
    for name in ("photos/a.png", "prior/dogs/b.png"):
        (out / name).parent.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(out / name)
    for name in (
        "checkpoint-3/state.bin", ".partial-output/x", "logs/run", "class_dogs/c.png", "weights",
        "pipeline/model_index.json", "runs/events.out.tfevents.1.machine",
    ):  # fmt: skip
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("words")
    where = {"instance_data_dir": out / "photos", "class_data_dir": out / "prior" / "dogs"}
    args = make_args(hub_token="hf_test", hub_model_id="subject", hub_private_repo=True, **where)
    assert "tester/subject/commit/" in publish(args, pipeline, None, {}, [])
    files = hub.files("tester/subject")
    assert sorted(files) == ["README.md", "pipeline/model_index.json", "weights"]
    assert hub.repos["tester/subject"].private
    assert "hf_test" not in files["README.md"].decode()
    args = make_args(full_finetune=True, hub_model_id="full", **where)
    publish(args, pipeline, None, {}, [])
    assert sorted(hub.files("tester/full")) == ["README.md", "model_index.json", "weights"]


def test_the_repository_is_named_after_the_folder(hub, accelerator, make_args, pipeline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").write_text("words")
    args = make_args()
    args.output_dir = "."
    push_output(args, subject_card(args, pipeline))
    assert list(hub.repos) == [f"tester/{tmp_path.name}"]


@pytest.mark.parametrize("logging_dir", ["logs/", "logs", "../logs"])
def test_checkpoints_logs_and_inputs_are_left_here(tmp_path, logging_dir):
    inside, outside = tmp_path / "out" / "a" / "b", tmp_path / "other"
    args = argparse.Namespace(output_dir=str(tmp_path / "out"), logging_dir=logging_dir)
    always = ["checkpoint-*", ".partial-*", "*tfevents*"]
    logs = [] if ".." in logging_dir else ["logs/*"]
    assert left_here(args, str(inside), str(outside), None) == [*always, "a/b/*", *logs]


def test_an_upload_is_prepared_before_the_run(hub, make_args, pipeline):
    args = make_args(hub_model_id="subject", hub_private_repo=True)
    prepare_upload(args, subject_card(args, pipeline))
    assert hub.repos["tester/subject"].private
    assert not hub.files("tester/subject")
    with pytest.raises(ValueError, match="header .* must be .* Hub accepts, got: .*license"):
        prepare_upload(args, subject_card(make_args(hub_license="no such licence"), pipeline))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hub_token": "hf_wrong"}, "`hub_token` must be a token of the Hub"),
        ({"hub_license": None}, "`license` must be given, got None.* The flag is `--hub_license`"),
        ({"hub_license": "other"}, "`license_name` must be given"),
    ],
)
def test_what_an_upload_lacks_stops_the_run(
    hub, subject_line, tmp_path, monkeypatch, fresh_accelerator, arguments, message
):
    monkeypatch.setattr("diffusers_ext.training.nullspace.run.load_or_collect", None)
    line = subject_line(**{"push_to_hub": True, "hub_license": "mit", **arguments})
    with pytest.raises(ValueError, match=message):
        main(parse_args(line))
    assert not (tmp_path / "out").exists()
    assert not hub.repos


def test_a_run_is_published_at_its_end(teach, hub):
    folder = teach(
        push_to_hub=True, hub_token="hf_test", hub_license="mit", max_train_steps=1,
        validation_prompt="a white sks", num_validation_images=1,
    )  # fmt: skip
    files = hub.files("tester/out")
    assert {LORA_WEIGHT_NAME, "statistics/config.json", "training_report.json"} <= files.keys()
    card = card_of(hub, "tester/out")
    assert card.data.widget[0]["output"]["url"] in files
    drift = json.loads(files["training_report.json"])["predicted_drift"].values()
    assert card.data.eval_results[0].metric_value == pytest.approx(sum(drift) / len(drift), rel=1e-3)
    for content in files.values():
        assert b"hf_test" not in content
        assert str(folder.parent).encode() not in content
    assert not (folder / "README.md").exists()
    assert FeatureStatistics.from_pretrained("tester/out", subfolder="statistics").facts["prompts"]


def test_a_token_is_not_given_to_wandb(subject_line, capsys):
    with pytest.raises(SystemExit):
        parse_args(subject_line(report_to="wandb", hub_token="secret"))
    error = capsys.readouterr().err
    assert "`--hub_token` must not be used with `--report_to wandb`" in error
    assert "secret" not in error


def arguments(**values) -> argparse.Namespace:
    usual = {
        "pretrained_model_name_or_path": "tester/base", "output_dir": "outputs/noise",
        "hub_base_model": None, "hub_license": None, "hub_token": None, "hub_model_id": None,
        "hub_private_repo": False, "hub_license_name": None, "hub_license_link": None,
    }  # fmt: skip
    return argparse.Namespace(**{**usual, **values})


def test_what_the_card_needs(hub, tmp_path):
    upload_base()
    found = card_arguments(arguments())
    assert (found["base_model"], found["license"].license) == ("tester/base", "openrail++")
    local = {"pretrained_model_name_or_path": str(tmp_path), "hub_base_model": "tester/base"}
    assert card_arguments(arguments(**local))["base_model"] == "tester/base"
    other = {"hub_license": "other", "hub_license_name": "cogvideox", "hub_license_link": "LICENSE"}
    found = card_arguments(arguments(**other))["license"]
    assert (found.license, found.license_name, found.license_link) == tuple(other.values())
    with pytest.raises(ValueError, match="`license` must be given with `license_name` 'cogvideox'"):
        card_arguments(arguments(hub_license_name="cogvideox"))
    given = card_arguments(arguments(hub_license="mit", hub_token="hf_test"))
    assert (given["license"].license, given["token"]) == ("mit", "hf_test")
    with pytest.raises(ValueError, match=r"`license` must be given.* The flag is `--hub_license`"):
        card_arguments(arguments(pretrained_model_name_or_path=str(tmp_path)))


def test_where_it_goes():
    assert repository_name(arguments()) == "noise"
    assert repository_name(arguments(hub_model_id="tester/other")) == "tester/other"
    assert upload_arguments(arguments()) == {"private": None, "token": None}
    secret = arguments(hub_private_repo=True, hub_token="hf_test")
    assert upload_arguments(secret) == {"private": True, "token": "hf_test"}


def test_nobody_is_logged_in(hub, monkeypatch):
    check_login(arguments())
    with pytest.raises(ValueError, match="`hub_token` must be a token of the Hub, got one that it"):
        check_login(arguments(hub_token="hf_wrong"))
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match="`hub_token` must be given with `push_to_hub`"):
        check_login(arguments())
