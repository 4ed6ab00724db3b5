from __future__ import annotations

import importlib

import pytest
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
    get_peft_config,
)
from peft.utils import PeftType

from diffusers_ext.eraser.adapter import model as registration
from diffusers_ext.eraser.adapter.config import EraserConfig
from diffusers_ext.eraser.adapter.model import EraserModel


def test_peft_knows_the_eraser_and_a_second_registration_changes_nothing():
    before = list(PeftType)
    importlib.reload(registration).register_eraser()
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.ERASER] is EraserConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.ERASER] is EraserModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.ERASER] == "eraser_"
    assert list(PeftType) == before


def test_another_package_of_that_name_is_an_error(monkeypatch):
    class Foreign:
        pass

    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, PeftType.ERASER, Foreign)
    with pytest.raises(RuntimeError, match="type ERASER must be free, got .*Foreign registered"):
        registration.register_eraser()


def test_importing_it_is_enough(monkeypatch):
    mappings = (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING)
    for mapping in mappings:
        monkeypatch.delitem(mapping, PeftType.ERASER)
    with pytest.raises(KeyError, match="ERASER"):
        get_peft_config({"peft_type": "ERASER"})
    importlib.reload(registration)
    assert all(PeftType.ERASER in mapping for mapping in mappings)
    config = get_peft_config({"peft_type": "ERASER", "r": 3})
    assert isinstance(config, EraserConfig)
    assert config.r == 3
