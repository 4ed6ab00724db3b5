from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from diffusers_ext.eraser.adapter.outputs import erasers_disabled
from diffusers_ext.eraser.attack import learn_revival_embeddings
from diffusers_ext.eraser.batch import encode_video_prompts
from diffusers_ext.eraser.files import convert_eraser, load_eraser, save_eraser
from diffusers_ext.eraser.linear import convert_eraser_to_lora, merge_eraser
from diffusers_ext.eraser.recipe import EraserTraining
from diffusers_ext.eraser.teacher.runs import EraserText
from diffusers_ext.eraser.text_codebook import (
    attach_text_codebook,
    attached_codebook,
    codebook_of_recipe,
    detach_text_codebook,
    learn_text_codebook,
    round_text,
)
from diffusers_ext.families.cogvideox import CogVideoXVelocity
from tests.eraser.erased_models import erased_pipeline, random_rows
from tests.eraser.saved_erasers import inputs, make_eraser, run, saved_eraser
from tests.tiny_cogvideox import TEXT_WIDTH, tiny_transformer

_KEY = "base_model.model.text_codebook"


def tokens(count, seed=0, width=TEXT_WIDTH):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def guarded(codebook, **config):
    transformer = make_eraser(tiny_transformer(), **config)
    attach_text_codebook(transformer, "default", codebook)
    return transformer


def test_each_token_becomes_the_nearest_and_padding_stays():
    codebook, text = tokens(7), tokens(10, 1).view(2, 5, -1)
    text[1, 3:] = 0
    found = round_text(text, codebook)
    nearest = codebook[torch.cdist(text, codebook).argmin(2)]
    assert torch.equal(found[0], nearest[0])
    assert torch.equal(found[1, :3], nearest[1, :3])
    assert not found[1, 3:].any()
    assert torch.equal(round_text(found, codebook), found)


def test_the_gradient_is_that_of_the_identity():
    text = tokens(4).view(1, 4, -1).requires_grad_()
    weights = tokens(4, 2).view(1, 4, -1)
    (round_text(text, tokens(3, 1)) * weights).sum().backward()
    assert torch.equal(text.grad, weights)


def test_half_precision_reads_tokens_of_its_dtype():
    found = round_text(tokens(4).view(1, 4, -1).bfloat16(), tokens(3, 1))
    assert found.dtype == torch.bfloat16
    assert all((tokens(3, 1).bfloat16() == row).all(1).any() for row in found[0])


def test_groups_of_near_tokens_become_their_means_and_the_empty_prompt_stays():
    centres, empty = 10 * torch.eye(4, TEXT_WIDTH), tokens(2, 3)
    prompts = (centres[:, None] + 0.01 * tokens(20).view(4, 5, -1)).transpose(0, 1)
    found = learn_text_codebook(prompts, empty, 6)
    assert found.shape == (6, TEXT_WIDTH)
    assert all((found == token).all(1).any() for token in empty)
    means = prompts.mean(0)
    assert torch.cdist(means, found).min(1).values.max() < 1e-4


def test_few_tokens_are_kept_as_they_are_without_padding_and_repetitions():
    prompts = torch.stack([tokens(3), tokens(3)])
    prompts[0, 2] = 0
    found = learn_text_codebook(prompts, tokens(1, 9), 100)
    assert len(found) == 4
    assert torch.cdist(tokens(3), found).min(1).values.max() < 1e-5


def test_a_model_reads_the_codebook_alone_while_its_eraser_is_at_work():
    codebook = tokens(6, 4)
    plain, transformer = run(tiny_transformer()), guarded(codebook)
    at_work = run(transformer)
    read = []
    transformer.patch_embed.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    assert torch.equal(run(transformer), at_work)
    assert all((codebook == token).all(1).any() for token in read[0].flatten(0, 1))
    with erasers_disabled(transformer):
        assert torch.equal(run(transformer), plain)
    transformer.set_adapters(["default"], [0.0])
    assert torch.equal(run(transformer), plain)
    transformer.set_adapters(["default"], [0.5])
    run(transformer)
    assert (codebook == read[-1][0, 0]).all(1).any()
    transformer.disable_adapters()
    assert torch.equal(run(transformer), plain)
    transformer.enable_adapters()
    transformer.set_adapters(["default"], [1.0])
    assert torch.equal(run(transformer), at_work)


def test_text_that_the_codebook_holds_changes_nothing():
    transformer = make_eraser(tiny_transformer())
    before = run(transformer)
    attach_text_codebook(transformer, "default", inputs(transformer)["encoder_hidden_states"].flatten(0, 1))
    assert torch.equal(run(transformer), before)


def test_positional_text_is_rounded_too():
    transformer = guarded(tokens(6, 4))
    given = inputs(transformer)
    with torch.no_grad():
        found = transformer(
            given["hidden_states"], given["encoder_hidden_states"], given["timestep"],
            image_rotary_emb=given["image_rotary_emb"], return_dict=False,
        )[0]  # fmt: skip
    assert torch.equal(found, run(transformer))


def test_an_eraser_of_the_same_name_has_no_codebook_of_another():
    transformer = guarded(tokens(6, 4))
    transformer.delete_adapters(["default"])
    assert torch.equal(run(transformer), run(tiny_transformer()))
    make_eraser(transformer)
    assert attached_codebook(transformer, "default") is None
    assert torch.equal(run(transformer), run(make_eraser(tiny_transformer())))


def test_detaching_brings_the_model_back():
    transformer = guarded(tokens(6, 4))
    detach_text_codebook(transformer, "default")
    assert torch.equal(run(transformer), run(make_eraser(tiny_transformer())))
    assert not transformer._forward_pre_hooks


def test_a_codebook_is_saved_and_loaded_with_its_eraser(tmp_path):
    transformer = guarded(tokens(6, 4))
    save_eraser(transformer, tmp_path / "eraser")
    assert json.loads((tmp_path / "eraser" / "adapter_config.json").read_text())["text_codebook_size"] == 6
    loaded = tiny_transformer()
    load_eraser(loaded, tmp_path / "eraser")
    assert torch.equal(attached_codebook(loaded, "default"), tokens(6, 4))
    assert torch.equal(run(loaded), run(transformer))
    save_eraser(loaded, tmp_path / "again")
    convert_eraser(tmp_path / "eraser", tmp_path / "converted", "peft")
    first, again, converted = (
        (tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("eraser", "again", "converted")
    )
    assert first == again
    assert torch.equal(load_file(tmp_path / "converted" / "adapter_model.safetensors")[_KEY], tokens(6, 4))
    assert len(converted) == len(first)


def test_files_of_erasers_without_one_are_as_before(tmp_path):
    folder = saved_eraser(tmp_path / "eraser")
    assert "text_codebook_size" not in json.loads((folder / "adapter_config.json").read_text())
    assert _KEY not in load_file(folder / "adapter_model.safetensors")


def test_a_size_in_the_config_alone_is_refused(tmp_path):
    folder = saved_eraser(tmp_path / "eraser", text_codebook_size=3)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "text_codebook_size": 3}))
    with pytest.raises(ValueError, match="`text_codebook_size` of .* must be the number of tokens"):
        load_eraser(tiny_transformer(), folder)


def test_what_has_no_place_for_it_is_refused(tmp_path):
    transformer = guarded(tokens(6, 4), kind="linear")
    save_eraser(transformer, tmp_path / "eraser")
    with pytest.raises(ValueError, match="must have no text codebook to be a LoRA"):
        convert_eraser_to_lora(tmp_path / "eraser", tmp_path / "lora")
    with pytest.raises(ValueError, match="must have no text codebook"):
        merge_eraser(transformer)
    with pytest.raises(ValueError, match="`format` must be 'peft' for an eraser with a text codebook"):
        save_eraser(guarded(tokens(6, 4)), tmp_path / "legacy", format="legacy")


def test_learned_embeddings_reach_nothing_but_mixtures_of_kept_tokens():
    """The attack has gradients, lowers its loss, and is left with tokens of the codebook."""
    pipeline = erased_pipeline("rotary", torch.float32)
    transformer, rows = pipeline.transformer, random_rows(6, dtype=torch.float32)
    velocity = CogVideoXVelocity.from_pipeline(pipeline, 9, 16, 16)
    free = learn_revival_embeddings(velocity, *rows, num_embeddings=4, steps=25, learning_rate=0.3)
    name = next(iter(transformer.peft_config))
    attach_text_codebook(transformer, name, tokens(5, 4, rows[2].shape[2]))
    found = learn_revival_embeddings(velocity, *rows, num_embeddings=4, steps=25, learning_rate=0.3)
    assert len(set(found.losses)) > 1
    assert min(found.losses) > min(free.losses)


def text_of(pipeline, *prompts, preserved=("a red six", "a blue ten")):
    """Of prompts that name three, and of the same with nine."""
    anchors = [prompt.replace("three", "nine") for prompt in prompts]
    encoded = [encode_video_prompts(pipeline, list(texts)) for texts in (prompts, anchors, preserved, [""])]
    return anchors, EraserText(*encoded[:3], encoded[3][0])


def test_a_recipe_asks_for_a_codebook_in_which_the_target_becomes_its_anchor():
    pipeline, asked = erased_pipeline("rotary", torch.float32), ["a red three", "a three"]
    anchors, text = text_of(pipeline, *asked)
    assert codebook_of_recipe(pipeline, asked, anchors, text, EraserTraining()) is None
    found = codebook_of_recipe(pipeline, asked, anchors, text, EraserTraining(text_codebook_size=200))
    for given, read in ((text.target, text.anchor), (text.preserved, text.preserved), (text.anchor, text.anchor)):
        said = read.ne(0).any(dim=2)
        if given is text.anchor:  # no kept prompt: what is read is still of kept ones and of anchors
            assert all((found[:, 1] == token).all(1).any() for token in round_text(given, found)[said])
        else:
            assert torch.equal(round_text(given, found)[said], read[said])
    few = codebook_of_recipe(pipeline, asked, anchors, text, EraserTraining(text_codebook_size=15))
    assert few.shape == (30, 2, found.shape[2])
    assert all((found == pair).all(dim=(1, 2)).any() for pair in few[15:])  # pairs that some prompt has
    with pytest.raises(ValueError, match="must be above the 12 tokens of the empty prompt"):
        codebook_of_recipe(pipeline, asked, anchors, text, EraserTraining(text_codebook_size=1))
    _, silent = text_of(pipeline, *asked, preserved=[""])
    with pytest.raises(ValueError, match="must say something"):
        codebook_of_recipe(pipeline, asked, anchors, silent, EraserTraining(text_codebook_size=7))


def test_pairs_are_saved_and_read_in_place_of_what_is_looked_up(tmp_path):
    pairs = torch.stack([tokens(6, 4), tokens(6, 5)], dim=1)
    transformer = guarded(pairs)
    save_eraser(transformer, tmp_path / "eraser")
    loaded, read = tiny_transformer(), []
    load_eraser(loaded, tmp_path / "eraser")
    assert torch.equal(attached_codebook(loaded, "default"), pairs)
    assert torch.equal(run(loaded), run(transformer))
    loaded.patch_embed.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    run(loaded)
    assert all((pairs[:, 1] == token).all(1).any() for token in read[0].flatten(0, 1))
    with pytest.raises(ValueError, match="or pairs of them"):
        attach_text_codebook(loaded, "default", pairs[:, :1])
