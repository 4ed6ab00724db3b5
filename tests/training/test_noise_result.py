from __future__ import annotations

import pytest
from huggingface_hub import ModelCard

from diffusers_ext.golden_noise.networks.base import load_noise_model
from diffusers_ext.training.golden_noise.result import figures_measured, trained_network_card
from diffusers_ext.training.noise import parse_pair_args as parse_args
from tests.evaluation.golden_subjects import small_network
from tests.training.noise_runs import read_report, train
from tests.training.noise_sets import digits_facts, write_noises

MADE = {"w1": 5.5, "redenoise_steps": 10, "models": {}, "reward": None}
DATA = {
    "generation": MADE,
    "training_samples": 900,
    "validation_samples": 100,
    "latent_shape": [4, 128, 128],
    "steps": [1],
}
FIGURES = {"step": 100, "validation_relative": 0.25, "validation_cosine": 0.9, "train_cosine": 1.0}


def make_args(**values):
    line = ["--base_model_id", "somebody/base", "--dataset_dir", "user/pairs", "--output_dir", "out"]
    line += ["--max_train_steps", "100", "--hub_token", "secret", "--hub_license", "mit"]
    args = parse_args(line)
    vars(args).update(values)
    return args


def make_card(data=DATA, validation=(FIGURES,), **values):
    facts = {"pipeline_class": "StableDiffusionXLPipeline", "data": data, "validation": validation}
    return trained_network_card(make_args(**values), small_network(), **facts)("me/noise")


def test_the_card_tells_what_it_is_how_it_loads_and_what_was_measured():
    card = make_card({**DATA, "removed_prompt_mean": 0.5}, use_ema=True)
    assert card.data.base_model == "somebody/base"
    assert card.data.license == "mit"
    results = {r.metric_name: (r.dataset_name, r.metric_value) for r in card.data.eval_results}
    held_out = "held-out prompts of user/pairs"
    assert results == {"relative squared error": (held_out, 0.25), "cosine with the true change": (held_out, 0.9)}
    for text in (
        'GoldenNoiseModel.from_pretrained("me/noise")',
        "GoldenNoiseXLPipeline.from_pretrained(",
        "900 noise pairs of user/pairs, with a share of 0.5 of each prompt's mean change taken out",
        "100 more were held out by their prompts",
        "4 x 128 x 128",
        "0 is perfect, 1 is the noise as it is; 100 noises",
    ):
        assert text in card.text
    plain = card.text.replace("\\", "")
    for row in ("| ema_decay | 0.999 |", "| max_train_steps | 100 |", "| noises: w1 | 5.5 |"):
        assert row in plain
    for left_over in ("{{", "{%", "None", "secret"):
        assert left_over not in str(card)


def test_the_card_before_the_training_and_on_noises_of_others():
    data = {**DATA, "generation": None, "steps": [3]}
    text = make_card(data, ()).text
    assert "Nothing was measured" in text
    assert "noise pairs of user/pairs, towards step 3 of their sequences" in text
    assert "ema_decay" not in text.replace("\\", "")
    assert "noises:" not in text.replace("\\", "")


def test_the_card_names_the_reward_and_no_path_of_this_machine(tmp_path):
    base = tmp_path / "my-base"
    base.mkdir()
    made = {**MADE, "reward": {"name": "hpsv2", "version": "v2.1"}}
    where = {"pretrained_model_name_or_path": str(base), "dataset_dir": str(tmp_path)}
    card = make_card({**DATA, "generation": made}, **where)
    assert "chosen by hpsv2 v2.1" in card.text
    assert f"pairs of {tmp_path.name}" in card.text
    assert "my-base" in card.text
    assert str(tmp_path.parent) not in str(card)


def test_figures_of_sequences_have_names_of_their_own():
    names = ("validation_relative_first", "validation_relative_rollout_last", "train_cosine_last")
    figures = figures_measured(make_args(), DATA, dict.fromkeys(names, 0.5))
    assert [result.metric for result in figures] == [
        "relative squared error of the first step",
        "relative squared error of the last step, rolled out",
    ]


@pytest.mark.usefixtures("fresh_accelerator")
def test_a_run_is_published_at_its_end(hub, tmp_path):
    pairs = write_noises(tmp_path / "out" / "pairs", facts=digits_facts())
    folder = train(
        "golden_noise_model", pairs, tmp_path / "out", push_to_hub=True, hub_token="hf_test",
        hub_model_id="noise", hub_license="mit", hub_private_repo=True, checkpointing_steps=2,
    )  # fmt: skip
    files = hub.files("tester/noise")
    assert files.keys() == {
        "README.md", "config.json", "diffusion_pytorch_model.safetensors", "training_report.json"
    }  # fmt: skip
    assert hub.repos["tester/noise"].private
    card = ModelCard(files["README.md"].decode())
    assert 'GoldenNoiseModel.from_pretrained("tester/noise")' in card.text
    report = read_report(folder)
    measured = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert measured["relative squared error"] == report["validation"][-1]["validation_relative"]
    assert "hub_token" not in report["arguments"]
    assert b"hf_test" not in b"".join(files.values())
    assert load_noise_model("tester/noise").config.width == 32


@pytest.mark.usefixtures("fresh_accelerator")
def test_what_the_card_lacks_stops_the_run_before_it_begins(hub, tmp_path):
    pairs = write_noises(tmp_path / "pairs")
    for wrong, message in (
        ({}, "`license` must be given, got None.* The flag is `--hub_license`"),
        ({"hub_license": "other"}, "`license_name` must be given with the license 'other'"),
        ({"hub_token": "hf_wrong", "hub_license": "mit"}, "`hub_token` must be a token of the Hub"),
    ):
        with pytest.raises(ValueError, match=message):
            train("golden_noise_model", pairs, tmp_path / "out", push_to_hub=True, **wrong)
    assert not (tmp_path / "out").exists()
    assert not hub.repos
