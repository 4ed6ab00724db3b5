from __future__ import annotations

import pytest
from peft import LoraConfig

from diffusers_ext.nullspace.lora import check_lora_config


@pytest.mark.parametrize(
    "options",
    [{}, {"lora_dropout": 0.1, "r": 3}, {"init_lora_weights": "gaussian", "lora_alpha": 7},
     {"target_modules": ["to_k"], "exclude_modules": ["up"], "init_lora_weights": False}],
)  # fmt: skip
def test_options_that_only_shape_a_and_b_pass(options):
    check_lora_config(LoraConfig(**options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "`use_dora` must be False, got True: DoRA rescales"),
        ({"bias": "lora_only"}, "`bias` must be 'none', got 'lora_only': a bias acts on every"),
        ({"lora_bias": True}, "`lora_bias` must be left at False, got True"),
        ({"init_lora_weights": "pissa"}, "must be True, False or 'gaussian', got 'pissa'"),
        ({"init_lora_weights": "olora"}, "must be True, False or 'gaussian', got 'olora'"),
        ({"modules_to_save": ["conv_in"]}, "`modules_to_save` must be left at None, got .*conv_in"),
        ({"rank_pattern": {"to_k": 2}}, r"`rank_pattern` must be left at \{\}, got \{'to_k': 2\}"),
        ({"alpha_pattern": {"to_k": 2}}, r"`alpha_pattern` must be left at \{\}, got"),
        ({"fan_in_fan_out": True}, "`fan_in_fan_out` must be left at False, got True"),
    ],
)
def test_options_that_break_preservation_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        check_lora_config(LoraConfig(**options))
