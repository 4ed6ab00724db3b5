from __future__ import annotations

import copy
import json
import pickle

import pytest
from peft import PeftConfig, PeftType

from diffusers_ext.eraser.adapter.config import EraserConfig, eraser_peft_type
from diffusers_ext.eraser.adapter.model import register_eraser

register_eraser()


def test_the_peft_type_is_a_member_like_the_others():
    member = eraser_peft_type()
    assert member is eraser_peft_type() is PeftType.ERASER is PeftType("ERASER")
    assert member is PeftType["ERASER"]
    assert member == "ERASER"
    assert member.value == member.name == "ERASER"
    assert list(PeftType).count(member) == 1
    assert pickle.loads(pickle.dumps(member)) is copy.deepcopy(member) is member
    assert json.dumps(member) == '"ERASER"'


def test_a_saved_config_comes_back(tmp_path):
    config = EraserConfig(
        r=7, target_modules=["attn1.to_out.1"], exclude_modules=["0.attn1.to_out.1"],
        layers_to_transform=[0, 3], concept="red seven", anchor_concept="digit",
        in_features=96, num_layers=4,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path) == config
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "ERASER"
    assert saved["layers_pattern"] == "transformer_blocks"
    assert pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize("r", [0, -1])
def test_the_rank_must_be_positive(r):
    with pytest.raises(ValueError, match=f"`r` must be at least 1, got {r}"):
        EraserConfig(r=r)


@pytest.mark.parametrize("r", [4.0, True, "8", None])
def test_the_rank_must_be_an_int(r):
    with pytest.raises(TypeError, match="`r` must be an int"):
        EraserConfig(r=r)


@pytest.mark.parametrize("name", ["concept", "anchor_concept"])
def test_concepts_must_be_words(name):
    with pytest.raises(TypeError, match=f"`{name}` must be a str or None"):
        EraserConfig(**{name: ["seven"]})


def test_layers_cannot_contradict_a_regular_expression():
    with pytest.raises(ValueError, match="must be None when `target_modules` is a regular"):
        EraserConfig(target_modules=r".*\.0\.attn1\.to_out\.1", layers_to_transform=[0])
    with pytest.raises(ValueError, match="`layers_pattern` must come with `layers_to_transform`"):
        EraserConfig(layers_pattern="transformer_blocks")


def test_an_expression_that_could_hang_or_means_nothing_is_refused(subtests):
    for pattern in ["(([a-z_0-9.]+)+)+!", "(a|a)*b", r"(.*)\1", "(?=a)b", ".*.*.*.*x", "a?" * 30, "[", "x" * 1001]:
        with subtests.test(pattern=pattern):
            for name in ("target_modules", "exclude_modules"):
                with pytest.raises(ValueError, match=f"`{name}` must be a regular expression"):
                    EraserConfig(**{name: pattern})


def test_names_and_simple_expressions_are_taken():
    EraserConfig(target_modules=r".*transformer_blocks\.(0|1\d)\.attn1\.to_out\.1$")
    EraserConfig(target_modules=["attn1.to_out.1"], exclude_modules=["transformer_blocks.0.attn1"])
    for names in (["(a+)+"], ["a b"], [""]):
        with pytest.raises(ValueError, match="`target_modules` must hold names of modules"):
            EraserConfig(target_modules=names)
    with pytest.raises(ValueError, match="`layers_pattern` must hold names"):
        EraserConfig(layers_to_transform=[0], layers_pattern="(a+)+")
    with pytest.raises(TypeError, match="`target_modules` must be names or one regular expression"):
        EraserConfig(target_modules=[1])


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [("num_layers", 300_000, ValueError), ("num_layers", "2", TypeError), ("in_features", 0, ValueError),
     ("layers_to_transform", ["0"], TypeError)],
)  # fmt: skip
def test_numbers_are_checked(field, value, error):
    with pytest.raises(error, match=f"`{field}` must"):
        EraserConfig(**{field: value})
