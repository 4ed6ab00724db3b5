"""What those get who do not have this package: all of a LoRA and of a data set, else clear words."""

from __future__ import annotations

import pytest

from diffusers_ext.golden_noise.pairs.shards import PairRecord
from tests.golden_noise.golden_pipelines import NETWORKS
from tests.golden_noise.pair_sets import PROMPTS


pytestmark = pytest.mark.timeout(900)


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
        assert f"no class `{cls.__name__}`" in without_package["networks"][name]
    assert without_package["eraser"] == "KeyError: 'ERASER'"
