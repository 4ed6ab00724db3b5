"""Keywords of downloads: unknown ones are refused whether or not something is downloaded."""

from __future__ import annotations

import pytest

from diffusers_ext.core.download_arguments import DOWNLOAD_ARGUMENTS, check_download_arguments
from diffusers_ext.evaluation.features import CLIPFeatures
from diffusers_ext.rewards.clip_score import CLIPScoreReward
from diffusers_ext.rewards.hpsv2 import HPSv2Reward
from diffusers_ext.rewards.pickscore import PickScoreReward


def test_keywords_of_a_download_pass():
    check_download_arguments(dict.fromkeys(DOWNLOAD_ARGUMENTS), "load")


def test_others_are_named_with_what_was_meant():
    with pytest.raises(
        TypeError, match=r"load\(\) got an unexpected keyword argument 'revison'"
    ) as e:
        check_download_arguments({"token": None, "revison": "main"}, "load")
    assert "Did you mean 'revision'?" in str(e.value)
    with pytest.raises(TypeError, match="'typo': of a download it takes revision") as e:
        check_download_arguments({"typo": 1}, "load")
    assert "Did you mean" not in str(e.value)


@pytest.mark.parametrize("loader", [CLIPFeatures, CLIPScoreReward, PickScoreReward, HPSv2Reward])
def test_loaders_of_judges_refuse_them_for_a_folder(tmp_path, loader):
    with pytest.raises(TypeError, match=rf"{loader.__name__}.from_pretrained\(\) got .* 'typo'"):
        loader.from_pretrained(tmp_path, typo=1)
