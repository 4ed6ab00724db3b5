"""What golden noise costs by the target it has: calls of the denoiser, and pictures drawn with a gradient."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPModel

from diffusers_ext.families.family import TextConditioning
from diffusers_ext.families.published import encoder_sizes
from diffusers_ext.golden_noise.diversity import NUM_PROBES
from diffusers_ext.planning.models import ImageShapes, guided_work, module_bytes, redenoise_work, vae_work
from diffusers_ext.planning.settings import REWARDS, GoldenNoisePlanSettings, GuardPlanSettings
from diffusers_ext.planning.work import Job, Precision, Work, inference_work
from diffusers_ext.rewards.clip import projected_features
from diffusers_ext.rewards.hpsv2 import vit_h_14_config

_REWARD_BATCH = 16
PHASES = {
    "guidance": "re-denoising",
    "reward": "climbing the reward",
    "best_of_n": "choosing noises",
    "diversity": "spreading noises",
}


def reward_model(reward: str) -> CLIPModel:
    """One of `REWARDS` on the meta device."""
    config = vit_h_14_config()
    if reward == "clip_score":  # ViT-L-14
        vision = {**encoder_sizes(1024, 16, 24), "patch_size": 14}
        config = CLIPConfig(text_config=encoder_sizes(768, 12, 12), vision_config=vision, projection_dim=768)
    with torch.device("meta"):
        return CLIPModel(config).requires_grad_(False).eval()


def reward_work(reward: str, pictures: int, batches: float) -> Work:
    """The reward judges so many pictures of a batch."""
    rows = min(_REWARD_BATCH, pictures)

    def begin(model: torch.nn.Module, device: torch.device) -> Callable[[], object]:
        side = model.config.vision_config.image_size
        pixels = torch.randn(rows, 3, side, side, device=device)
        tokens = torch.zeros(rows, 77, dtype=torch.long, device=device)
        return lambda: (model.get_image_features(pixel_values=pixels), model.get_text_features(input_ids=tokens))

    name, build = "reward's activations", partial(reward_model, reward)
    return inference_work(name, batches * pictures / rows, build, begin)


class Drawing(torch.nn.Module):
    """The frozen models that draw and judge, with a gradient through the last `steps` of denoising.

    A reward that is not among `REWARDS` is the mean of the pixels.
    """

    def __init__(self, shapes: ImageShapes, setting: GoldenNoisePlanSettings, steps: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.pipeline, self.shapes, self.steps = shapes.pipeline(dtype), shapes, steps
        self.guidance = setting.guidance_scale
        self.denoiser = getattr(self.pipeline, shapes.base.denoiser)
        self.vae = torch.nn.Module.to(self.pipeline.vae, dtype)  # diffusers' own `to` warns of a cast
        self.judge = reward_model(setting.reward) if setting.reward in REWARDS else None
        self.requires_grad_(False)

    def slope(self, noise: torch.Tensor, text: TextConditioning) -> torch.Tensor:
        """The gradient of the pictures' reward to the noise, of its shape."""
        x = latents = noise.detach().requires_grad_()
        for _ in range(self.steps):
            latents = latents + 0.1 * self.shapes.guided(self.pipeline, latents, text, self.guidance)
        given = self.shapes.family.to_vae(self.pipeline, latents).to(self.vae.dtype)
        pixels = self.vae.decode(given, return_dict=False)[0]
        pixels = pixels[:, :, 0] if pixels.ndim == 5 else pixels
        if self.judge is not None:
            side = self.judge.config.vision_config.image_size
            shown = F.interpolate(pixels.float(), (side, side), mode="bilinear")
            pixels = projected_features(self.judge.get_image_features(pixel_values=shown))
        (gradient,) = torch.autograd.grad(pixels.float().mean(), x)
        return gradient


def reward_parts(reward: str | None) -> tuple[dict[str, int], list[str]]:
    """Bytes of the reward's model, and a note where they are not known; nothing without a reward."""
    if reward in REWARDS:
        return {"reward model": module_bytes(reward_model(reward))}, []
    return {}, [] if reward is None else [f"What the reward {reward!r} takes is not counted."]


def gradient_steps(setting: GoldenNoisePlanSettings) -> int:
    """Denoising steps that the gradient goes through the denoiser of."""
    return min(setting.gradient_steps or setting.num_inference_steps, setting.num_inference_steps)


def draw_works(
    shapes: ImageShapes,
    setting: GoldenNoisePlanSettings | GuardPlanSettings,
    rows: int,
    times: float,
    precision: Precision,
) -> list[Work]:
    """Pictures of `rows` noises drawn together, decoded one by one, then judged."""
    dtype = precision.dtype
    if dtype == torch.float16 and shapes.base.component("vae").whole_config().force_upcast:
        dtype = torch.float32
    works = [
        guided_work(shapes, rows, setting.guidance_scale, times * setting.num_inference_steps, precision),
        vae_work(shapes.base, shapes.vae_latents, rows * times, dtype, decodes=True),
    ]
    return [*works, reward_work(setting.reward, rows, times)] if setting.reward in REWARDS else works


def slope_works(
    shapes: ImageShapes, setting: GoldenNoisePlanSettings, rows: int, times: float, precision: Precision
) -> list[Work]:
    """The reward's gradient to `rows` noises; earlier steps are denoised without one."""
    steps = gradient_steps(setting)

    def make(num_layers: int = steps) -> Job:
        drawing = Drawing(shapes, setting, num_layers, precision.dtype)

        def begin(device: torch.device) -> Callable[[], object]:
            text = shapes.conditioning(rows, device, precision.dtype)
            return lambda: drawing.slope(torch.randn(rows, *shapes.latents, device=device), text)

        return Job([drawing], begin)

    works = [Work("gradient through denoiser, VAE and reward", times, make, layers=steps)]
    before = setting.num_inference_steps - steps
    if before:
        works.append(guided_work(shapes, rows, setting.guidance_scale, times * before, precision))
    return works


def first_step_work(
    shapes: ImageShapes, setting: GoldenNoisePlanSettings, rows: int, times: float, precision: Precision
) -> Work:
    """The gradient of the first step's prediction to `rows` noises."""

    def make() -> Job:
        pipeline = shapes.pipeline(precision.dtype)
        denoiser = getattr(pipeline, shapes.base.denoiser).requires_grad_(False)

        def begin(device: torch.device) -> Callable[[], object]:
            text = shapes.conditioning(rows, device, precision.dtype)

            def repeat() -> None:
                x = torch.randn(rows, *shapes.latents, device=device).requires_grad_()
                predicted = shapes.guided(pipeline, x, text, setting.guidance_scale)
                torch.autograd.grad(predicted.square().mean(), x)

            return repeat

        return Job([denoiser, pipeline.vae], begin)

    return Work("gradient through the denoiser", times, make)


def target_works(
    shapes: ImageShapes, setting: GoldenNoisePlanSettings, rows: int, times: float, precision: Precision
) -> list[Work]:
    """What makes golden noises of `rows` pairs, `times` in all, by the setting's target."""
    if setting.target == "guidance":
        return [redenoise_work(shapes, setting, rows, times, precision)]
    times *= setting.num_steps
    if setting.target == "best_of_n":
        return draw_works(shapes, setting, rows, times * setting.best_of, precision)
    climbs = times * setting.ascent_steps
    if setting.target == "reward":  # the end is judged without a gradient, in less memory
        return [
            *slope_works(shapes, setting, rows, climbs, precision),
            *draw_works(shapes, setting, rows, times, precision),
        ]
    # The fixed noises, the seed's, and the end of the way.
    asked = times * (NUM_PROBES + 2)
    return [
        first_step_work(shapes, setting, rows, climbs, precision),
        guided_work(shapes, rows, setting.guidance_scale, asked, precision),
    ]
