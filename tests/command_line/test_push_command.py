from __future__ import annotations

import re

import pytest
from huggingface_hub import ModelCard

from diffusers_ext.command_line.push import read_facts
from diffusers_ext.nullspace.statistics import FeatureStatistics

BASE = {"base_model": "tester/base", "license": "apache-2.0"}
LORA = {**BASE, "instance_prompt": "a photo of sks", "trained_on": "Six pictures."}
KIND = ("--fact", "pipeline=StableDiffusionPipeline", "--fact", "directions=plain")


def test_a_lora(run, hub, lora):
    ran = run("push", lora, "tester/sks", *KIND, json=True, **LORA)
    assert ran.code == 0
    assert ran.facts["repo_id"] == "tester/sks"
    assert ran.facts["url"].startswith(hub.endpoint)
    files = hub.files("tester/sks")
    name = "pytorch_lora_weights.safetensors"
    assert files[name] == (lora / name).read_bytes()
    card = ModelCard(files["README.md"].decode())
    assert (card.data.license, card.data.base_model) == ("apache-2.0", "tester/base")
    assert card.data.instance_prompt == "a photo of sks"
    assert "Six pictures." in card.text


def test_a_licence_that_the_hub_does_not_list(run, hub, statistics):
    facts = {"base_model": "tester/base", "license_name": "own", "license_link": "https://a.b/c"}
    assert run("push", statistics, "tester/known", license="other", **facts).code == 0
    data = ModelCard(hub.files("tester/known")["README.md"].decode()).data
    assert (data.license, data["license_name"], data["license_link"]) == (
        "other", "own", "https://a.b/c",
    )  # fmt: skip
    ran = run("push", statistics, "tester/known", **facts)
    assert ran.code == 1
    assert "`--license` must be given with `--license_name` 'own'" in ran.err


def test_statistics_as_a_private_pull_request_in_a_subfolder(run, hub, statistics):
    ran = run("push", statistics, "tester/known", "--private", **BASE)
    assert ran.code == 0
    assert ran.out.startswith(f"Pushed: {hub.endpoint}/")
    assert hub.repos["tester/known"].private
    found = FeatureStatistics.from_pretrained("tester/known")
    assert found.linears == FeatureStatistics.from_pretrained(statistics).linears
    ran = run(
        "push", statistics, "tester/known", "--create_pr", subfolder="again",
        commit_message="Once more", **BASE,
    )  # fmt: skip
    assert "/discussions/" in ran.out
    assert not [name for name in hub.files("tester/known") if name.startswith("again/")]
    ran = run("push", statistics, "tester/known", revision="next", subfolder="again", **BASE)
    assert ran.code == 0
    assert "again/config.json" in hub.files("tester/known", revision="next")


def test_collecting_and_pushing_at_once(run, hub, digits, prompts, tmp_path):
    ran = run(
        "collect", "--push_to_hub", pretrained_model_name_or_path=digits, device="cpu",
        knowledge_prompts=prompts, output_dir=tmp_path / "known", json=True, **BASE,
    )  # fmt: skip
    assert ran.code == 0
    assert ran.facts["url"].startswith(hub.endpoint)
    assert "config.json" in hub.files("tester/known")
    found = FeatureStatistics.from_pretrained("tester/known")
    assert found.moments["text"].mean.equal(FeatureStatistics.from_pretrained(tmp_path / "known").moments["text"].mean)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        # A name of its own: the card of a model that another test shared may be in the cache.
        ({"license": None, "base_model": "tester/cardless"}, "`--license` must be given"),
        ({"trained_on": None}, "`--trained_on` must be given"),
        ({"fact": "sks"}, "`--fact` must be NAME=VALUE, each name once, got 'sks'."),
        ({"fact": "license=mit"}, "`--fact` must not name what has a flag of its own, got ['license']"),
        ({"fact": "token=hf_x"}, "`--fact` must not name what has a flag of its own, got ['token']"),
        ({"fact": "colour=red"}, "colour"),
        ({"results": "nowhere"}, "nowhere"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_anything_is_uploaded(run, hub, lora, flags, message):
    given = {k: v for k, v in {**LORA, **flags}.items() if v is not None}
    ran = run("push", lora, "tester/sks", *KIND, **given)
    assert (ran.code, ran.out) == (1, "")
    assert message in ran.err
    assert not hub.repos


def test_nothing_to_push(run, hub, tmp_path):
    assert "got nowhere: there is none." in run("push", "nowhere", "tester/x").err
    (tmp_path / "notes.txt").write_text("mine")
    assert "`source` must hold" in run("push", tmp_path, "tester/x", **BASE).err
    assert not hub.repos


def test_a_refusal_of_the_hub_is_one_line(run, hub, statistics):
    ran = run("push", statistics, "tester/known", hub_token="hf_stranger", **BASE)
    assert (ran.code, ran.out) == (1, "")
    assert re.fullmatch("error: 403 .*\n", ran.err)
    assert "hf_stranger" not in ran.err


def test_facts_are_json_or_text():
    assert read_facts(["a=1", "b=two words", 'c=["x"]', "d=x=y", "e="]) == {
        "a": 1, "b": "two words", "c": ["x"], "d": "x=y", "e": "",
    }  # fmt: skip
    for entry in ("=1", "a b=1", "word"):
        with pytest.raises(ValueError, match=f"must be NAME=VALUE, each name once, got '{entry}'"):
            read_facts([entry])
    with pytest.raises(ValueError, match="got 'a=2'"):
        read_facts(["a=1", "a=2"])
