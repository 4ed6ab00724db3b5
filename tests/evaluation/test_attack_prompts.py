"""Prompts of attacks: public sets, own lists, rewrites."""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from diffusers_ext.evaluation.attack_prompts import (
    INSTRUCTIONS,
    OWN_FORMS,
    attack_groups,
    own_paraphrases,
    read_prompt_set,
    rewrite_prompts,
)
from diffusers_ext.evaluation.settings import AttackSettings

I2P = (
    "prompt,categories,hard,inappropriate_percentage,nudity_percentage,sd_seed,sd_guidance_scale\n"
    '"a dog, running",shocking,0,12.5,0.0,4057,7\na cat,hate,1,20,1.5,,7\n'
)
RING_A_BELL = ",sensitive prompt,evaluation_seed,evaluation_guidance\n0,dog dog wolf,3912,7.5\n"
MMA = "target_prompt,adv_prompt\na dog,d0g barks\n"


@pytest.mark.parametrize(
    ("name", "text", "prompts", "seeds"),
    [
        ("i2p.csv", I2P, ["a dog, running", "a cat"], [4057, None]),
        ("ring_a_bell.csv", RING_A_BELL, ["dog dog wolf"], [3912]),
        ("mma.csv", MMA, ["d0g barks"], [None]),
        ("3.txt", "A dog runs.\n\nDogs fight.\n", ["A dog runs.", "Dogs fight."], [None, None]),
        ("set.jsonl", '{"prompt": "a dog", "sd_seed": 5}\n{"prompt": "a cat"}\n', ["a dog", "a cat"], [5, None]),
    ],
)
def test_public_sets_are_read_as_they_are(tmp_path, name, text, prompts, seeds):
    path = tmp_path / name
    path.write_text(text)
    assert read_prompt_set(str(path)) == (prompts, seeds)


def test_other_tables_are_refused(tmp_path):
    path = tmp_path / "other.csv"
    path.write_text("words,seed\na dog,1\n")
    with pytest.raises(ValueError, match="must name a table with one of the columns .*'sensitive prompt'.* got \\["):
        read_prompt_set(str(path))
    with pytest.raises(ValueError, match="`attacks` must be a text file of prompts or a table .*: no such file"):
        read_prompt_set(str(tmp_path / "nowhere.csv"))
    path.write_text("prompt\n \n")
    with pytest.raises(ValueError, match="must name prompts, got none in the column 'prompt'"):
        read_prompt_set(str(path))


def test_paraphrases_are_of_a_list_a_report_or_around_the_concept(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("a puppy\nman's best friend\n")
    assert own_paraphrases(str(path), "dog") == ["a puppy", "man's best friend"]
    assert own_paraphrases(None, "dog") == [form.format(concept="dog") for form in OWN_FORMS]
    assert own_paraphrases(None, None) == []
    report = tmp_path / "report.json"
    report.write_text(json.dumps({"settings": {"paraphrases": ["a hound"]}}))
    assert own_paraphrases(str(report), "dog") == ["a hound"]
    report.write_text(json.dumps({"settings": {}}))
    with pytest.raises(ValueError, match="`paraphrases` must be a report that holds some, got"):
        own_paraphrases(str(report), "dog")


@pytest.fixture(scope="module")
def instruct_model(tmp_path_factory):
    """A folder of a tiny model that chats, in words without sense."""
    folder = tmp_path_factory.mktemp("instruct")
    words = ["<unk>", "<end>", "dog", "wolf", "runs", "away", "user", *" ".join(INSTRUCTIONS).split()]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>", pad_token="<end>")
    fast.chat_template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, eos_token_id=1, pad_token_id=1, bos_token_id=1, max_position_embeddings=128,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_local_model_rewrites_each_prompt_by_each_instruction(instruct_model):
    found = rewrite_prompts(["dog runs", "wolf runs"], str(instruct_model), most_tokens=4)
    assert 2 <= len(found) <= 2 * len(INSTRUCTIONS)
    assert len(set(found)) == len(found)
    assert found == rewrite_prompts(["dog runs", "wolf runs"], str(instruct_model), most_tokens=4)
    with pytest.raises(ValueError, match="`rewriter` must be a local instruct model, got ./nowhere"):
        rewrite_prompts(["dog"], "./nowhere")


def test_groups_hold_prompts_and_seeds_of_files_and_rewrites(instruct_model, tmp_path):
    path = tmp_path / "i2p.csv"
    path.write_text(I2P)
    settings = AttackSettings(
        attacks=["paraphrase", "scale", f"prompt_file:{path}"], rewriter=str(instruct_model), max_attack_prompts=1
    )
    groups = attack_groups(settings, ["dog runs"], "dog")
    assert groups == {"attack: paraphrase": (["dog"], [None]), "attack: i2p": (["a dog, running"], [4057])}
