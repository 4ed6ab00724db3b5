"""Peers of erasers on video models, against what their papers' equations say."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext

import pytest
import torch
from peft.tuners.lora import LoraLayer

from benchmarks.baselines.esd_video import erase_video_concept, stopped_run
from benchmarks.baselines.guarded_calls import GuardedCalls, NegativePrompt
from benchmarks.baselines.nag import NormalizedAttentionGuidance, normalized_guidance, text_attentions
from benchmarks.baselines.safree import (
    Safree,
    carries_concept,
    filtered_share,
    pooled_without_each,
    projected,
    span_projection,
)
from benchmarks.baselines.videoeraser import VideoEraser, concept_scale
from benchmarks.document_recipe import DocumentRecipe, DocumentTexts, document_loss, noised_randomness
from diffusers_ext.eraser.adapter.outputs import eraser_layers
from diffusers_ext.eraser.attack import learn_revival_embeddings, revived_prompts
from diffusers_ext.families import find_family
from tests.tiny_cogvideox import tiny_video_pipeline
from tests.tiny_current_pipelines import tiny_wan_pipeline
from tests.tiny_erasers import add_random_eraser

PROMPTS = ["a red seven moving right", "a blue two moving up"]
CALL = {"num_frames": 9, "num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "latent"}
SIZES = {"num_inference_steps": 3, "max_sequence_length": 12}


@pytest.fixture(scope="module", params=["cogvideox", "wan"])
def pipeline(request):
    if request.param == "cogvideox":
        found = tiny_video_pipeline()
        found.set_progress_bar_config(disable=True)
        return found
    return tiny_wan_pipeline()


@pytest.fixture(scope="module")
def cogvideox():
    found = tiny_video_pipeline()
    found.set_progress_bar_config(disable=True)
    return found


def drawn(pipeline, prompts=PROMPTS, **call):
    side = 16 if type(pipeline).__name__ == "CogVideoXPipeline" else 32
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    size = {"height": side, "width": side, "max_sequence_length": 12}
    return pipeline(list(prompts), generator=generators, **{**CALL, **size, **call}).frames


class Watched(GuardedCalls):
    """Keeps what it is handed."""

    def answer(self, told, others, steps):
        self.seen = (len(told), [len(one) for one in others], steps.tolist())
        return super().answer(told, others, steps)

    def further(self):
        return [self.of_concept, self.empty]


def test_guarded_calls_find_the_prompts_rows_and_change_nothing_by_themselves(pipeline):
    plain, guard = drawn(pipeline), Watched(pipeline, "seven", **SIZES)
    guard.know(PROMPTS[1:])
    with guard.active():
        assert torch.allclose(drawn(pipeline), plain, atol=1e-5)
    assert guard.seen == (1, [1, 1], [2])
    assert not pipeline.transformer._forward_hooks
    assert not pipeline.transformer._forward_pre_hooks


def test_rows_are_found_behind_added_embeddings(pipeline):
    guard = GuardedCalls(pipeline, "seven", **SIZES)
    guard.know(PROMPTS)
    text = guard.encode([PROMPTS[1], "", PROMPTS[0]])
    rows, prompts = guard.rows_of(torch.cat([text, torch.randn(3, 4, text.shape[2])], dim=1))
    assert (rows.tolist(), prompts.tolist()) == ([0, 2], [1, 0])


def test_negative_prompt_is_the_pipelines_own(pipeline):
    guard = NegativePrompt(pipeline, "seven", guidance_scale=CALL["guidance_scale"], **SIZES)
    guard.know(PROMPTS)
    with guard.active():
        found = drawn(pipeline)
    expected = drawn(pipeline, negative_prompt="seven")
    assert torch.allclose(found, expected, atol=1e-4)
    assert not torch.allclose(found, drawn(pipeline), atol=1e-3)


def test_nag_by_hand():
    positive, negative = torch.tensor([[1.0, -1.0]]), torch.tensor([[0.0, 1.0]])
    # phi = 2: Z~ = (3, -5), |Z~| / |Z+| = 4, cut to 2: Z^ = (1.5, -2.5); a quarter of it.
    found = normalized_guidance(positive, negative, scale=3.0, tau=2.0, alpha=0.25)
    assert torch.allclose(found, torch.tensor([[0.25 * 1.5 + 0.75, -0.25 * 2.5 - 0.75]]))
    assert torch.allclose(
        normalized_guidance(positive, negative, scale=3.0, tau=9.0, alpha=1.0), 3 * positive - 2 * negative
    )


def test_nag_guides_what_attention_gives_for_both_prompts(pipeline):
    """In the first layer, where nothing else has changed."""
    name, attention = next(iter(text_attentions(pipeline.transformer).items()))
    text = 12 if name.endswith("attn1") else 0
    kept = []
    hook = attention.to_out[0].register_forward_hook(lambda module, args, out: kept.append(args[0][:, text:].clone()))
    try:
        one = {"num_inference_steps": 1, "guidance_scale": 1.0}
        drawn(pipeline, PROMPTS[:1], **one)
        drawn(pipeline, ["seven"], **one)
        guard = NormalizedAttentionGuidance(pipeline, "seven", scale=4.0, tau=1.2, alpha=0.5, **SIZES)
        guard.know(PROMPTS)
        with guard.active():
            drawn(pipeline, PROMPTS[:1], **one)
    finally:
        hook.remove()
    expected = normalized_guidance(kept[0], kept[1], 4.0, 1.2, 0.5)
    assert torch.allclose(kept[2], expected.expand(2, -1, -1), atol=1e-5)
    assert not attention.to_out[0]._forward_pre_hooks


def test_nag_shares_the_video_and_does_nothing_at_scale_one(pipeline):
    shared = []

    class Nag(NormalizedAttentionGuidance):
        def answer(self, told, others, steps):
            shared.append(torch.allclose(told, others[0], atol=1e-5))
            return told

    plain = drawn(pipeline)
    for scale, changes in ((1.0, False), (11.0, True)):
        guard = Nag(pipeline, "seven", scale=scale, **SIZES)
        guard.know(PROMPTS)
        with guard.active():
            assert torch.allclose(drawn(pipeline), plain, atol=1e-4) is not changes
    assert shared
    assert all(shared)


def test_safree_by_hand():
    unit = torch.eye(3, dtype=torch.float64)
    onto = span_projection(2 * unit[:1])
    assert torch.allclose(onto, torch.outer(unit[0], unit[0]))
    # Without the second token nothing of the concept is left.
    masked = torch.stack([3 * unit[0] + unit[1], 2 * unit[1], 3 * unit[0] + unit[1]])
    assert carries_concept(masked, onto, 0.01).tolist() == [False, True, False]
    assert not carries_concept(masked, onto, 1.01).any()  # 2 > (1 + alpha) 1
    # In the span of the first two axes, and off the first.
    assert torch.allclose(projected(torch.ones(1, 3, dtype=torch.float64), masked, onto), unit[1:2])
    turned = filtered_share(unit[:1], unit[1:2], gamma=10)
    assert turned == pytest.approx(10 / (1 + math.exp(-1)) / 50)
    assert filtered_share(unit, unit) == pytest.approx(0.1)


def test_safree_masks_one_token_after_the_other(pipeline):
    masked = pooled_without_each(pipeline, "red seven", 12)
    count = len(pipeline.tokenizer("red seven").input_ids) - 1
    assert masked.shape == (count, pipeline.text_encoder.config.d_model)
    assert not torch.allclose(masked[-1], masked[-2], atol=1e-3)


def test_safree_replaces_some_tokens_for_some_steps(pipeline):
    guard = Safree(pipeline, "seven", **SIZES, alpha=-0.5)  # all tokens
    guard.know(PROMPTS)
    assert guard._num_steps.tolist() == [0, 0]  # of three steps; of 20 they are 2
    guard._num_steps[:] = 1
    text, prompts = guard.encode(PROMPTS), torch.tensor([0, 1])
    found = guard.text(text, prompts, torch.tensor([0, 1]))
    assert torch.equal(found[1], text[1])
    count = len(pipeline.tokenizer(PROMPTS[0]).input_ids) - 1
    onto = guard._onto_concept
    assert (found[0, :count].double() @ onto).abs().max() < 1e-5 * text.abs().max()
    assert torch.equal(found[0, count:], text[0, count:])
    added = torch.randn(2, 3, text.shape[2])
    behind = guard.text(torch.cat([text, added], dim=1), prompts, torch.tensor([0, 1]))
    assert torch.equal(behind, torch.cat([found, added], dim=1))
    within = torch.cat([text[:, : count + 1], added, text[:, count + 4 :]], dim=1)  # in the place of padding
    assert torch.equal(guard.text(within, prompts, torch.tensor([0, 1]))[:, count + 1 :], within[:, count + 1 :])


def test_safree_at_every_step_changes_clips(pipeline):
    guard = Safree(pipeline, "seven", every_step=True, alpha=-0.5, **SIZES)
    guard.know(PROMPTS)
    with guard.active():
        assert not torch.allclose(drawn(pipeline), drawn(pipeline, ["red", "up"]), atol=1e-3)
        changed = drawn(pipeline)
    assert not torch.allclose(changed, drawn(pipeline), atol=1e-3)


def test_videoeraser_by_hand(cogvideox):
    told, concept = torch.tensor([0.0, 0.5, 2.0, -3.0]), torch.zeros(4)
    assert torch.allclose(concept_scale(told, concept, 1.5, 1.0), torch.tensor([0.0, 0.75, 0.0, 1.0]))
    guard = VideoEraser(cogvideox, "seven", momentum_scale=0.5, beta=0.6, **SIZES)
    told, concept, without = torch.full((1, 2), 3.0), torch.full((1, 2), 4.0), torch.full((1, 2), 1.0)
    with torch.no_grad():
        first = guard.answer(told, [concept, without], torch.tensor([0]))
        second = guard.answer(told, [concept, without], torch.tensor([1]))
        again = guard.answer(told, [concept, without], torch.tensor([0]))
    assert torch.allclose(first, torch.zeros(1, 2))  # 3 - 1 (4 - 1)
    assert torch.allclose(second, torch.full((1, 2), -0.5 * 0.4 * 3))
    assert torch.equal(again, first)


def test_videoeraser_filters_a_quarter_of_the_steps(pipeline):
    guard = VideoEraser(pipeline, "seven", max_sequence_length=12, num_inference_steps=50)
    guard.know(PROMPTS)
    assert guard._num_steps.tolist() == [13, 13]
    guard = VideoEraser(pipeline, "seven", **SIZES)
    guard.know(PROMPTS)
    plain = drawn(pipeline)
    with guard.active():
        assert not torch.allclose(drawn(pipeline), plain, atol=1e-3)


def velocity_of(pipeline):
    side = 16 if type(pipeline).__name__ == "CogVideoXPipeline" else 32
    return find_family(pipeline).velocity(pipeline, 9, side, side)


def test_attacks_learn_against_guarded_calls(pipeline):
    guard = NegativePrompt(pipeline, "seven", guidance_scale=3.0, **SIZES)
    guard.know(PROMPTS)
    velocity, x_t = velocity_of(pipeline), torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    points = (x_t, torch.tensor([900, 400]), guard.encode(PROMPTS))
    with torch.no_grad():
        before = velocity(*points)
    losses = []
    for active in (True, False):
        with guard.active() if active else nullcontext():
            found = learn_revival_embeddings(velocity, *points, v_concept=before, steps=2, batch_size=2)
        losses.append(found.losses)
    assert losses[0][0] > 1.01 * losses[1][0]
    watched = Watched(pipeline, "seven", **SIZES)
    watched.know(PROMPTS)
    plain = drawn(pipeline)
    with revived_prompts(pipeline, found.embeddings), watched.active():
        assert not torch.allclose(drawn(pipeline), plain, atol=1e-3)
    assert watched.seen[0] == 2


def test_esd_runs_as_the_pipeline_does(pipeline):
    seen = []

    def keep(_, step, timestep, state):
        seen.append(state["latents"].clone())
        return {}

    drawn(pipeline, ["seven"], callback_on_step_end=keep)
    guard, scheduler = GuardedCalls(pipeline, "seven", **SIZES), copy.deepcopy(pipeline.scheduler)
    scheduler.set_timesteps(3)
    wan = type(pipeline).__name__ == "WanPipeline"
    start = torch.randn(1, *seen[0].shape[1:], generator=torch.Generator().manual_seed(0))
    texts = torch.cat([guard.empty, guard.of_concept])
    found = stopped_run(velocity_of(pipeline), scheduler, start.transpose(1, 2) if wan else start, texts, 2, 3.0)
    assert torch.allclose(found.transpose(1, 2) if wan else found, seen[1], atol=1e-4)


@pytest.mark.parametrize("make", [tiny_video_pipeline, tiny_wan_pipeline])
def test_esd_trains_a_lora_on_the_attention_that_reads_text(make):
    losses = []
    for eta in (1.0, 0.0):
        pipeline = make()
        guard = GuardedCalls(pipeline, "seven", **SIZES)
        texts = torch.cat([guard.empty, guard.of_concept])
        found = erase_video_concept(
            pipeline, velocity_of(pipeline), (3, 4, 4, 4), texts, learning_rate=1e-3, steps=2, rank=2, eta=eta,
            num_inference_steps=2,
        )  # fmt: skip
        losses.append(found[0])
        layers = {name for name, module in pipeline.transformer.named_modules() if isinstance(module, LoraLayer)}
        assert {name.split(".")[2] for name in layers} == {"attn1" if make is tiny_video_pipeline else "attn2"}
        assert len(layers) == 2 * 4
        moved = [p for name, p in pipeline.transformer.named_parameters() if "lora_B" in name]
        assert all(parameter.abs().max() > 0 for parameter in moved)
    # |v_c - v_0 + eta (v_c - v_0)|^2, before anything has moved
    assert losses[0] == pytest.approx(4 * losses[1], rel=1e-3)


def test_the_documents_recipe_noises_as_the_scheduler_does_and_trains_the_eraser(pipeline):
    family, t = find_family(pipeline), torch.tensor([250, 700])
    generator = torch.Generator().manual_seed(0)
    x_t = noised_randomness(family, pipeline.scheduler, (2, 3, 4, 4, 4), t, generator)
    clean, noise = torch.randn(2, 2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    if family.flow_matching:
        assert torch.allclose(x_t[0], 0.75 * clean[0] + 0.25 * noise[0])
    else:
        assert torch.allclose(x_t, pipeline.scheduler.add_noise(clean, noise, t), atol=1e-6)
    student = copy.copy(pipeline)
    student.transformer = copy.deepcopy(pipeline.transformer)
    add_random_eraser(student.transformer)
    student.transformer.requires_grad_(False)
    ups = [
        layer.eraser_up["default"].weight.requires_grad_(True) for layer in eraser_layers(student.transformer).values()
    ]
    guard = GuardedCalls(pipeline, "seven", **SIZES)
    text = guard.encode(["seven", "not seven", "two"]).split(1)
    mask = torch.zeros(1, text[0].shape[1], dtype=torch.bool)
    mask[:, 0] = True
    loss = document_loss(
        velocity_of(pipeline), velocity_of(student), DocumentTexts(*text, mask), x_t, t,
        lambda mask: mask.mean(), DocumentRecipe(),
    )  # fmt: skip
    loss.backward()
    assert all(up.grad.abs().sum() > 0 for up in ups)
