"""Everything is pushed by one fresh process and loaded by two others, one without this package.

In one file, so that one worker of a test run starts these processes.
"""

from __future__ import annotations

import re

import pytest
import yaml

from diffusers_ext.golden_noise.pairs.shards import PairRecord
from tests.golden_noise.golden_pipelines import NETWORKS
from tests.golden_noise.pair_sets import PROMPTS
from tests.hub.push_and_load import BRANCH, FOLDER, OWNER_WORDS
from tests.hub.shared_artifacts import PIPELINES, SHARED

# A loaded machine may take its time over the processes that the first test starts.
pytestmark = pytest.mark.timeout(900)
WAYS = {"main": "first", "branch": "second", "commit": "second", "pull request": "second"}


def kind_of(name: str) -> str:
    return "dataset" if name.startswith("pairs") else "model"


def test_what_is_loaded_is_what_was_pushed(round_trip, loaded):
    for name in SHARED:
        pushed = round_trip.pushed[name]
        assert pushed["first"] != pushed["second"]
        for way, state in WAYS.items():
            assert loaded[way][name] == pushed[state], way
            assert loaded[f"{way} offline"][name] == pushed[state], way
        if SHARED[name].subfolders:
            assert loaded["subfolder"][name] == loaded["subfolder offline"][name] == pushed["second"]


def test_pipelines_of_the_other_families(round_trip, loaded):
    for name in PIPELINES:
        assert loaded["others"][name] == [PIPELINES[name][0].__name__, round_trip.pushed[name]["first"]]


def test_private_repositories_refuse_strangers(round_trip, loaded):
    for name in SHARED:
        prefix = "datasets/" if name == "pairs" else ""
        assert round_trip.hub.repos[f"{prefix}tester/{name}"].private
        refusal = loaded["no token"][name]
        assert refusal.startswith(("ValueError: `", "OSError", "RepositoryNotFoundError: 401"))
        assert f"tester/{name}" in refusal
        assert "private" in refusal or "Repository Not Found" in refusal


def test_plain_classes_and_other_doors_to_the_same_files(round_trip, loaded):
    others, pushed = loaded["others"], round_trip.pushed
    assert others["plain of golden"] == ["StableDiffusionPipeline", others["plain"]]
    assert others["network of a pipeline"] == pushed["golden"]["first"]
    assert others["network of a branch"] == pushed["npnet"]["second"]
    assert others["PeftModel"] == others["AutoPeftModel"]


def test_the_cards_say_how_to_load_it(loaded):
    expected = {"eraser": 3, "lora": 3, "null": 3}
    assert loaded["cards"] == {name: expected.get(name, 2) for name in SHARED}


def test_a_push_is_one_commit_and_sends_nothing_twice(round_trip):
    for name in SHARED:
        prefix = "datasets/" if name == "pairs" else ""
        repo = round_trip.hub.repos[f"{prefix}tester/{name}"]
        assert len(repo.at("main").history()) == 2  # the Hub's own and ours
        # The branch begins at `main`; the same files are no commit, the owner's card is one.
        titles = ["Upload with diffusers_ext", "Upload README.md with huggingface_hub"]
        assert [commit.title for commit in repo.at(BRANCH).history()][:2] == titles
        assert len(repo.at("refs/pr/1").history()) == 3
        sent = [r.path for r in round_trip.hub.sent("PUT", f"^/{prefix}tester/{name}.git/lfs")]
        assert len(sent) == len(set(sent)) == len(repo.objects)
        below = (
            set(round_trip.hub.files(f"tester/{name}-below", kind_of(name)))
            if (SHARED[name].subfolders)
            else {"README.md"}
        )
        assert {path for path in below if not path.startswith(f"{FOLDER}/")} == {"README.md"}


def test_the_owners_words_survive_the_next_push(round_trip):
    for name in SHARED:
        files = round_trip.hub.files(f"tester/{name}", kind_of(name), revision=BRANCH)
        _, header, text = files["README.md"].decode().split("---\n", 2)
        header = yaml.safe_load(header)
        assert (header["license"], header["language"]) == ("cc0-1.0", "en")
        assert "mine" in header["tags"]
        assert len(header["tags"]) > 2
        before, rest = text.split("<!-- diffusers_ext:begin")
        _, after = rest.split("<!-- diffusers_ext:end -->")
        assert before.strip() == OWNER_WORDS[0].strip()
        assert after.strip() == OWNER_WORDS[1].strip()


# Those who do not have this package get all of a LoRA and of a data set, else clear words.


def test_a_lora_draws_the_same_picture_to_the_bit(round_trip, without_package):
    found = without_package["lora"]
    assert found["same keys"]
    assert found["digest"] == round_trip.pushed["lora"]["first"]
    assert found["plain picture"] not in found["digest"]


def test_a_data_set_is_all_there(without_package):
    columns = list(PairRecord._fields)
    assert without_package["data set"] == {
        "pairs": [columns, list(PROMPTS[:3])], "rejected": [columns, [PROMPTS[3]]]
    }  # fmt: skip


def test_the_cards_tell_what_can_be_loaded(without_package):
    assert without_package["cards"] == {
        "golden": ["pipeline: StableDiffusionPipeline"],
        "null": ["pipeline: StableDiffusionPipeline"],
        "lora-below": ["pipeline: StableDiffusionPipeline"],
        "statistics-below": ["moments: dict"],
    }
    assert without_package["card of pairs"] == ["golden: Tensor"]


@pytest.mark.parametrize("cls", ["StableDiffusionPipeline", "DiffusionPipeline"])
def test_pipelines_with_unknown_components_are_refused_with_their_names(without_package, cls):
    for name, component in {"golden": "noise_model", "null": "statistics"}.items():
        assert f"{component}/diffusers_ext.py as defined in" in without_package[cls][name]


def test_networks_and_erasers_are_refused(without_package):
    for name, (cls, _) in NETWORKS.items():
        assert re.search(rf"no (class|attribute) `?{cls.__name__}\b", without_package["networks"][name])
    assert without_package["eraser"] == "KeyError: 'ERASER'"
