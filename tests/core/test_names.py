from __future__ import annotations

import pytest

from diffusers_ext.core.settings import check_keywords, did_you_mean


def test_the_nearest_names():
    assert did_you_mean("rnak", ["rank", "seed"]) == " Did you mean 'rank'?"
    assert did_you_mean(["rnak", "SEEDS"], ["rank", "seed"]) == " Did you mean 'rank' and 'seed'?"
    assert did_you_mean("colour", ["rank", "seed"]) == ""


def test_keywords_that_nothing_takes():
    check_keywords({"rank": 4}, ["rank", "seed"], "train")
    with pytest.raises(TypeError) as refused:
        check_keywords({"rnak": 4}, iter(["rank", "seed"]), "train", "it takes rank")
    assert str(refused.value) == (
        "train() got an unexpected keyword argument 'rnak': it takes rank. Did you mean 'rank'?"
    )
    with pytest.raises(TypeError, match=r"train\(\) got an unexpected keyword argument 'colour'\.$"):
        check_keywords({"colour": 4}, ["rank"], "train")
