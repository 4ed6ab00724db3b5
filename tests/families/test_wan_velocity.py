"""Wan's velocity and clips: what its own pipeline does, in all its versions."""

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanTransformer3DModel

from diffusers_ext.eraser.teacher.trajectory import served_steps, teacher_trajectory
from diffusers_ext.families.wan import Wan, WanVelocity
from tests.tiny_current_pipelines import tiny_wan_pipeline

SIZE, SHAPE = (9, 32, 32), (3, 4, 4, 4)
PROMPTS = ["a red seven  moving right", "a blue two"]
# As Wan's checkpoints have it, but for the steps that are shown.
UNIPC = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
EULER = FlowMatchEulerDiscreteScheduler(shift=3.0)


@pytest.fixture(scope="module")
def pipeline():
    return tiny_wan_pipeline()


@pytest.fixture(params=["2.1", "2.1 in half precision", "UniPC", "a timestep a token", "two transformers"])
def version(request, pipeline):
    """The pipeline as each version of Wan has it."""
    parts = pipeline.components
    changes = {"scheduler": UNIPC} if request.param not in ("2.1", "2.1 in half precision") else {}
    if request.param == "two transformers":
        second = WanTransformer3DModel.from_config(parts["transformer"].config)
        changes |= {"transformer_2": second.eval(), "boundary_ratio": 0.7}
    if request.param == "a timestep a token":
        changes["expand_timesteps"] = True
    found = type(pipeline)(**{**parts, **changes})
    found.set_progress_bar_config(disable=True)
    if request.param == "2.1 in half precision":
        found.transformer = WanTransformer3DModel.from_config(parts["transformer"].config).to(torch.bfloat16).eval()
    return found


def test_a_run_is_that_of_the_pipeline(version):
    latents = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1))
    half = version.transformer.dtype == torch.bfloat16
    arguments = {"num_inference_steps": 4, "guidance_scale": 3.0}
    size = dict(zip(("num_frames", "height", "width"), SIZE))
    call = {
        **arguments,
        **size,
        "latents": latents.transpose(1, 2),
        "output_type": "latent",
        "max_sequence_length": 16,
    }
    expected = version(PROMPTS, negative_prompt=["", ""], **call).frames.transpose(1, 2).float()
    texts = Wan().encode_clip_prompts(version, [*PROMPTS, ""])
    negative = texts[2:].expand(2, -1, -1)
    for expert in Wan().expert_timesteps(version):
        velocity = Wan().velocity(version, *SIZE, expert=expert)
        *_, last = teacher_trajectory(velocity, version.scheduler, latents, texts[:2], negative, **arguments)
        torch.testing.assert_close(last.x_next, expected, atol=0.1 if half else 1e-4, rtol=0.02 if half else 1e-4)


def test_each_transformer_serves_its_timesteps(pipeline):
    second = WanTransformer3DModel.from_config(pipeline.transformer.config).eval()
    parts = {**pipeline.components, "scheduler": UNIPC, "transformer_2": second}
    both = type(pipeline)(**parts, boundary_ratio=0.7)
    served = [
        served_steps(Wan().velocity(both, *SIZE, expert=name), UNIPC, 5, SHAPE)
        for name in ("transformer", "transformer_2")
    ]
    assert served == [[0, 1, 2], [3, 4]]
    velocity = Wan().velocity(both, *SIZE, expert="transformer_2")
    x_t, t = torch.randn(3, *SHAPE), torch.tensor([900, 300, 700])
    text = torch.randn(3, 512, 32)
    found = velocity(x_t, t, text)
    for row, model in enumerate((pipeline.transformer, second, pipeline.transformer)):
        alone = WanVelocity(model)(x_t[[row]], t[[row]], text[[row]])
        torch.testing.assert_close(found[[row]], alone)
    with pytest.raises(ValueError, match="a step for each of the model's transformers"):
        served_steps(velocity, UNIPC, 1, SHAPE)


def test_prompts_are_encoded_as_by_the_call(pipeline):
    with torch.no_grad():
        found = Wan().encode_clip_prompts(pipeline, PROMPTS)
        expected, _ = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False, max_sequence_length=16)
    assert torch.equal(found, expected)
    assert found.shape == (2, 16, 32)  # as the tokenizer says
    assert not found[1, -3:].any()
    assert Wan().clean_prompt(" a &amp;  b ") == "a & b"


def test_sizes_are_those_of_the_model(pipeline):
    family, config = Wan(), pipeline.transformer.config
    assert family.latent_shape(config, pipeline.vae.config, *SIZE) == SHAPE
    assert family.token_grid(config, SHAPE) == (3, 2, 2)
    assert family.clip_size(config, pipeline.vae.config) == (81, 480, 832)
    for size, message in (
        ((8, 32, 32), "`num_frames` must be a multiple of 4 plus 1 .* The nearest is 9"),
        ((9, 40, 32), "`height` must be a positive multiple of 16 .* The nearest is 32"),
        ((9, 32, 0), "`width` must be a positive multiple of 16"),
        ((9, 32, 32 * 16 + 16), "at most 32 tokens along an axis .* got 33"),
    ):
        with pytest.raises(ValueError, match=message):
            family.latent_shape(config, pipeline.vae.config, *size)


def test_bad_input_is_refused(pipeline):
    velocity = Wan().velocity(pipeline, *SIZE)
    text, t = torch.randn(2, 512, 32), torch.tensor([5.0, 7.0])
    for arguments, message in (
        ((torch.randn(2, 4, 3, 4, 4), t, text), r"`x_t` must be \(batch, frames, 4, height, width\)"),
        ((torch.randn(2, *SHAPE), t[:1], text), r"`t` must be \(2,\)"),
        ((torch.randn(2, *SHAPE), t, text[..., :5]), r"`prompt_embeds` must be \(2, text, 32\)"),
        ((torch.randn(2, 3, 4, 3, 4), t, text), "`latent_shape` must have frames"),
    ):
        with pytest.raises(ValueError, match=message):
            velocity(*arguments)
    ddim = type(pipeline)(**{**pipeline.components, "scheduler": DDIMScheduler()})
    with pytest.raises(ValueError, match="`pipeline.scheduler` must have the levels of flow matching"):
        Wan().velocity(ddim, *SIZE)
    pictures = WanTransformer3DModel.from_config(pipeline.transformer.config, in_channels=8)
    with pytest.raises(ValueError, match="must be of text-to-video Wan"):
        WanVelocity(pictures)
