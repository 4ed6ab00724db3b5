"""Keywords of downloads: unknown ones are refused whether or not something is downloaded."""

from __future__ import annotations

import pytest

from diffusers_ext.core.download_arguments import DOWNLOAD_ARGUMENTS, check_download_arguments


def test_keywords_of_a_download_pass():
    check_download_arguments(dict.fromkeys(DOWNLOAD_ARGUMENTS), "load")


def test_others_are_named_with_what_was_meant():
    with pytest.raises(
        TypeError, match=r"load\(\) got an unexpected keyword argument 'revison'"
    ) as e:
        check_download_arguments({"token": None, "revison": "main"}, "load")
    assert "Did you mean `revision`?" in str(e.value)
    with pytest.raises(TypeError, match="'typo': of a download it takes revision") as e:
        check_download_arguments({"typo": 1}, "load")
    assert "Did you mean" not in str(e.value)
