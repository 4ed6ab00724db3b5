from __future__ import annotations

import argparse

import pytest

from diffusers_ext.training.run.upload import card_arguments, check_login, repository_name, upload_arguments
from tests.golden_noise.shared_facts import upload_base


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
