"""Edits of knowledge in closed form: the equations, exactness, and what the digits model then draws."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionPipeline

from diffusers_ext.core.pipelines import denoiser_of
from diffusers_ext.nullspace.edit import added_updates, edit_concept, edit_matrix, low_rank, read_weight
from diffusers_ext.nullspace.edit_prompts import ConceptEdit
from diffusers_ext.nullspace.text_only import denoiser_arguments
from examples.digits.check_model import draw, load_pipeline
from examples.digits.judge import DigitsJudge
from examples.digits.prompts import DIGITS, HELD_OUT_TEMPLATE
from examples.digits.subjects import knowledge_prompts
from tests.tiny_digits import random_digits_pipeline
from tests.tiny_image_pipelines import tiny_flux_pipeline, tiny_sd3_pipeline
from tests.tiny_pipelines import sdxl_pipeline


def moments(seed: int = 0, dim: int = 6, free: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    k0, k1, k2 = torch.randn(3, 40, dim, generator=generator, dtype=torch.float64)
    k0[:, dim - free :] = 0
    return k0, k1, k2, (k2 - k1).T @ k1 / 40, k1.T @ k1 / 40, k0.T @ k0 / 40


def test_the_matrix_minimises_its_objective():
    k0, k1, k2, d_c, c1, c0 = moments()
    weight = torch.randn(3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def objective(delta: torch.Tensor) -> torch.Tensor:
        edit = (k1 @ delta.T - (k2 - k1) @ weight.T).square().sum() / 40
        kept = (k0 @ delta.T).square().sum() / 40
        return edit + 2 * kept + 1e-3 * c1.diagonal().mean() * delta.square().sum()

    delta = (weight @ edit_matrix(d_c, c1, c0, preserve_weight=2, eps=1e-3)).requires_grad_()
    (gradient,) = torch.autograd.grad(objective(delta), delta)
    assert gradient.abs().max() < 1e-12


def test_a_hard_edit_is_zero_on_what_is_preserved():
    k0, k1, k2, d_c, c1, c0 = moments(free=2)
    matrix = edit_matrix(d_c, c1, c0, preserve_weight=1, eps=1e-6, hard=True)
    assert (k0 @ matrix.T).abs().max() < 1e-12
    assert (k1 @ matrix.T).norm() > 0.1 * (k2 - k1).norm()
    with pytest.raises(ValueError, match="`preserve` must leave directions free"):
        edit_matrix(*moments()[3:], preserve_weight=1, eps=1e-6, hard=True)


def test_the_smallest_rank_that_keeps_the_share_is_taken():
    *_, d_c, c1, c0 = moments()
    matrix = edit_matrix(d_c, c1, c0, preserve_weight=1, eps=1e-4)
    left, a, share = low_rank(matrix, c1, 1.0)
    assert torch.allclose(left @ a, matrix)
    assert share == pytest.approx(1)
    left, a, share = low_rank(matrix, c1, 0.9)
    lost = matrix - left @ a
    assert 1 - torch.trace(lost @ c1 @ lost.T) / torch.trace(matrix @ c1 @ matrix.T) == pytest.approx(share)
    assert share >= 0.9
    assert low_rank(matrix, c1, share - 1e-9)[1].shape == a.shape


@pytest.mark.parametrize("build", [random_digits_pipeline, sdxl_pipeline, tiny_flux_pipeline])
def test_preserved_prompts_keep_their_outputs_under_a_hard_edit(build, tmp_path):
    pipeline = build()
    edits = [ConceptEdit("three", "nine", prompts=["a three"])]
    result = edit_concept(pipeline, edits, ["a nine"], hard=True, expand_sub_phrases=False)
    steps = {"num_inference_steps": 2, "output_type": "latent", "height": 32, "width": 32}

    def latents(prompt: str) -> torch.Tensor:
        return pipeline(prompt, generator=torch.Generator().manual_seed(0), **steps).images

    before = {prompt: latents(prompt) for prompt in ("a nine", "", "a three")}
    pipeline.load_lora_weights(result.lora)
    for fused in (False, True):
        if fused:
            pipeline.fuse_lora()
        moved = {p: ((latents(p) - x).norm() / x.norm()).item() for p, x in before.items()}
        assert max(moved["a nine"], moved[""]) < 1e-5
        assert moved["a three"] > 1e-4


def test_the_target_reads_as_its_anchor():
    pipeline = random_digits_pipeline()
    edit = ConceptEdit("three", "nine", prompts=["a red three"])
    result = edit_concept(pipeline, [edit], ["a one"], preserve_weight=0.01, eps=1e-8, kept=1.0)
    k1, k2 = (
        denoiser_arguments(pipeline, [prompt])["encoder_hidden_states"] for prompt in ("a red three", "a red nine")
    )
    name = result.report.layers[0]["linear"]
    weight = pipeline.unet.get_submodule(name).weight
    update = result.lora[f"unet.{name}.lora_B.weight"] @ result.lora[f"unet.{name}.lora_A.weight"]
    assert torch.allclose(k1 @ (weight + update).T, k2 @ weight.T, atol=2e-2)
    assert all(row["achieved"] > 0.98 for row in result.report.layers)


def test_deeper_linears_correct_what_earlier_updates_left():
    result = edit_concept(tiny_sd3_pipeline(), {"three": "nine"}, ["a red one"])
    assert {row["source"] for row in result.report.layers} == {
        "text",
        "pooled_projections",
        "time_text_embed.text_embedder.linear_2",
    }


def test_editing_leaves_the_pipeline_as_it_was():
    pipeline = random_digits_pipeline()
    state = {k: v.clone() for k, v in pipeline.unet.state_dict().items()}
    edit_concept(pipeline, {"three": "nine"}, ["a red one"])
    assert all(torch.equal(state[name], value) for name, value in pipeline.unet.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in pipeline.unet.modules())


def test_added_updates_act_inside_and_leave_nothing():
    pipeline = random_digits_pipeline()
    unet = denoiser_of(pipeline)
    name = next(n for n, _ in unet.named_modules() if n.endswith("attn2.to_k"))
    linear, x = unet.get_submodule(name), torch.randn(2, 128)
    a, b = torch.randn(1, 128, dtype=torch.float64), torch.randn(linear.out_features, 1, dtype=torch.float64)
    before = linear(x)
    with added_updates(unet, {name: (a, b)}):
        assert torch.allclose(linear(x), before + x @ (b @ a).float().T, atol=1e-4)
    assert torch.equal(linear(x), before)
    with pytest.raises(RuntimeError, match="shapes"), added_updates(unet, {name: (a, b)}):
        linear(x[:, 1:])
    assert torch.equal(linear(x), before)


def test_a_weight_that_cannot_be_read_is_told_by_what_it_computes():
    linear = torch.nn.Linear(3, 2)
    packed = torch.nn.Linear(3, 2)
    packed.load_state_dict(linear.state_dict())
    packed.in_features, packed.weight = (
        3,
        torch.nn.Parameter(torch.zeros(6, 1, dtype=torch.uint8), requires_grad=False),
    )
    packed.forward = linear.forward
    assert torch.allclose(read_weight(packed), linear.weight.double(), atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"edits": {}}, "`edits` must hold at least one target"),
        ({"edits": {"three": "nine"}, "kept": 0}, "`kept` must be above 0"),
        ({"edits": {"three": "THREE"}}, "`anchor` must be read otherwise than `target`"),
    ],
)
def test_bad_input_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        edit_concept(random_digits_pipeline(), preserve=["a one"], **arguments)


def test_a_pipeline_with_a_lora_is_refused():
    pipeline = random_digits_pipeline()
    pipeline.load_lora_weights(edit_concept(pipeline, {"three": "nine"}, ["a one"]).lora)
    with pytest.raises(ValueError, match="must carry no LoRA while it is edited"):
        edit_concept(pipeline, {"seven": "eight"}, ["a one"])


@pytest.fixture(scope="module")
def edited() -> StableDiffusionPipeline:
    pipeline = load_pipeline()
    result = edit_concept(pipeline, {"three": "nine"}, knowledge_prompts())
    pipeline.load_lora_weights(result.lora)
    return pipeline


def test_the_digits_model_draws_nines_for_threes_and_the_rest_as_before(edited):
    prompts = [
        *(f"a {color} {digit}" for color in ("red", "blue") for digit in ("three", "one", "nine", "eight")),
        *(HELD_OUT_TEMPLATE.format(digit=digit, color="green") for digit in ("three", "six", "two")),
    ]
    names = DigitsJudge().read(draw(edited, prompts, seed=5, num_inference_steps=10)).names
    wanted = [next(word for word in prompt.split() if word in DIGITS) for prompt in prompts]
    assert names == [{"three": "nine"}.get(word, word) for word in wanted]
