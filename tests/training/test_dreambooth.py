from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler
from PIL import Image
from torch.utils.data import TensorDataset

from diffusers_ext.core.seeds import check_prediction_type
from diffusers_ext.families.sdxl import SDXL
from diffusers_ext.families.stable_diffusion import StableDiffusion
from diffusers_ext.families.text_conditioning import TextConditioning
from diffusers_ext.nullspace.step import Condition, DreamBoothLoss
from diffusers_ext.training.nullspace.data import (
    encode_condition,
    encode_images,
    list_images,
    load_image,
    make_class_images,
)
from examples.digits.check_model import load_pipeline
from tests.tiny_pipelines import sdxl_pipeline


class Echo(torch.nn.Module):
    """A denoiser whose prediction is a weight times its input."""

    config = SimpleNamespace(time_cond_proj_dim=None)

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.5))
        self.seen: list[dict] = []

    def forward(self, sample, timesteps, encoder_hidden_states, return_dict, added_cond_kwargs=None):
        self.seen.append({"t": timesteps, "embeds": encoder_hidden_states, "added": added_cond_kwargs})
        return (self.weight * sample,)


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline()


def save(path, size=(40, 20), mode="RGB"):
    ramp = np.linspace(0, 255, size[0], dtype=np.uint8)
    Image.fromarray(np.tile(ramp, (size[1], 1))).convert(mode).save(path)
    return path


def test_pictures_are_listed_by_name(tmp_path):
    for name in ("b.PNG", "a.jpg", "c.webp", "10.jpeg", "9.bmp"):
        save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not a picture")
    names = [path.name for path in list_images(tmp_path)]
    assert names == ["10.jpeg", "9.bmp", "a.jpg", "b.PNG", "c.webp"]


def test_folders_without_pictures(tmp_path):
    with pytest.raises(ValueError, match="must hold pictures .*png.*, got none"):
        list_images(tmp_path)
    with pytest.raises(ValueError, match="`class_data_dir` must be a folder of pictures, got "):
        list_images(tmp_path / "missing", "class_data_dir")


def test_cropped_or_squeezed(tmp_path):
    path = save(tmp_path / "wide.png")
    cropped, squeezed = load_image(path, 8), load_image(path, 8, center_crop=False)
    for pixels in (cropped, squeezed):
        assert pixels.shape == (3, 8, 8)
        assert pixels.dtype == torch.float32
        assert pixels.abs().max() <= 1
    # The middle half of a ramp from -1 to 1, and all of it.
    assert cropped[0, 0, 0] == pytest.approx(-0.45, abs=0.05)
    assert squeezed[0, 0, 0] == pytest.approx(-0.9, abs=0.05)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    assert load_image(save(tmp_path / "picture.png", mode=mode), 16).shape == (3, 16, 16)


def test_hidden_colours_of_a_cut_out_do_not_train(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 4)).astype(np.uint8)
    pixels[..., 3] = 0
    pixels[16:48, 16:48] = (128, 128, 128, 255)
    Image.fromarray(pixels).save(tmp_path / "cut.png")
    assert load_image(tmp_path / "cut.png", 64)[:, :8, :8].std() < 1e-3


def test_sixteen_bit_grey_is_not_white(tmp_path):
    grey = np.full((64, 64), 20000, np.uint16)
    grey[16:48, 16:48] = 50000
    Image.fromarray(grey).save(tmp_path / "scan.png")
    loaded = load_image(tmp_path / "scan.png", 64)
    assert abs(loaded[0, 0, 0].item() + 0.39) < 0.02
    assert abs(loaded[0, 32, 32].item() - 0.53) < 0.02


def test_hidden_files_are_passed_over(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    (tmp_path / "._a.jpg").write_bytes(b"\0\5\x16\7")
    assert [path.name for path in list_images(tmp_path)] == ["a.jpg"]


def test_cameras_that_were_turned(tmp_path):
    picture = Image.fromarray(np.repeat(np.arange(0, 256, 8, dtype=np.uint8)[:, None], 32, 1))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    picture.save(tmp_path / "turned.png", exif=exif)
    pixels = load_image(tmp_path / "turned.png", 32)
    assert pixels[0, 0, 0] > pixels[0, 0, -1]
    torch.testing.assert_close(pixels[0, 0], pixels[0, -1])


def test_latents_hold_the_picture(pipeline, pictures):
    paths = list_images(pictures)
    dataset = encode_images(pipeline, paths, 32, center_crop=True, flip=False)
    assert len(dataset) == 3
    means, stds = dataset.tensors
    assert means.shape == stds.shape == (3, 4, 8, 8)
    assert means.dtype == torch.float32
    assert stds.min() > 0
    decoded = pipeline.vae.decode(means / pipeline.vae.config.scaling_factor).sample
    originals = torch.stack([load_image(path, 32) for path in paths])
    assert (decoded - originals).abs().mean() < 0.1
    both = encode_images(pipeline, paths, 32, center_crop=True, flip=True).tensors[0]
    torch.testing.assert_close(both[::2], means)
    mirrored = pipeline.vae.decode(both[1::2] / pipeline.vae.config.scaling_factor).sample
    assert (mirrored - originals.flip(-1)).abs().mean() < 0.1


def test_conditions_of_both_models(pipeline):
    condition = encode_condition(pipeline, "a red seven")
    assert condition.text.prompt_embeds.shape == (1, 16, 128)
    assert condition.text.pooled_prompt_embeds is None
    xl = sdxl_pipeline()
    condition = encode_condition(xl, "a red seven")
    embeds, pooled = condition.text.prompt_embeds, condition.text.pooled_prompt_embeds
    assert embeds.shape == (1, 16, xl.unet.config.cross_attention_dim)
    assert pooled.shape == (1, 16)
    latents, t = torch.randn(2, 4, 12, 12), torch.tensor([1, 2])
    added = {"text_embeds": pooled.expand(2, -1), "time_ids": torch.tensor([[48.0, 48, 0, 0, 48, 48]] * 2)}
    with torch.no_grad():
        wanted = xl.unet(latents, t, embeds.expand(2, -1, -1), added_cond_kwargs=added).sample
        found = condition.predict(xl.unet, latents, t, condition.of_samples(2, None))
    assert torch.equal(found, wanted)


def condition_of(embeds: torch.Tensor, pooled: torch.Tensor | None = None) -> Condition:
    """For `Echo`, which reads all it is told."""
    config = SimpleNamespace(time_cond_proj_dim=None)
    ids = lambda size, crop, target, dtype, width: torch.tensor([[*size, *crop, *target]], dtype=dtype)
    pipeline = SimpleNamespace(unet=SimpleNamespace(config=config), vae_scale_factor=4, _get_add_time_ids=ids)
    family = StableDiffusion() if pooled is None else SDXL()
    return Condition(TextConditioning(embeds, pooled_prompt_embeds=pooled), family, pipeline)


def make_loss(kind: str = "epsilon", **arguments) -> DreamBoothLoss:
    condition = condition_of(torch.ones(1, 3, 2), torch.zeros(1, 2))
    return DreamBoothLoss(DDPMScheduler(prediction_type=kind), condition, **arguments)


def batch(count: int = 3, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(count, 4, 8, 8, generator=generator)
    return [mean, torch.full_like(mean, 0.1)]


def drawn(generator: torch.Generator, count: int = 3):
    """What the loss draws, in its order."""
    sample = torch.randn(count, 4, 8, 8, generator=generator)
    noise = torch.randn(count, 4, 8, 8, generator=generator)
    return sample, noise, torch.randint(1000, (count,), generator=generator)


@pytest.mark.parametrize("snr_gamma", [None, 5.0])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_loss_is_the_formula(kind, snr_gamma):
    model, (mean, std) = Echo(), batch()
    loss = make_loss(kind, snr_gamma=snr_gamma)
    found = loss(model, [mean, std], torch.Generator().manual_seed(7))
    sample, noise, t = drawn(torch.Generator().manual_seed(7))
    alpha = loss.scheduler.alphas_cumprod[t][:, None, None, None]
    clean = mean + 0.1 * sample
    noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
    target = noise if kind == "epsilon" else alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
    errors = (0.5 * noisy - target).square().mean(dim=(1, 2, 3))
    if snr_gamma is not None:
        snr = (alpha / (1 - alpha)).flatten()
        errors = errors * snr.clamp(max=5.0) / (snr if kind == "epsilon" else snr + 1)
    torch.testing.assert_close(found["loss"], errors.mean())
    assert found.keys() == {"loss", "instance"}
    assert torch.equal(model.seen[0]["t"], t)
    assert model.seen[0]["embeds"].shape == (3, 3, 2)
    assert model.seen[0]["added"]["text_embeds"].shape == (3, 2)


def test_randomness_comes_from_the_generator_alone():
    losses = []
    for global_seed, seed in ((0, 1), (5, 1), (0, 2)):
        torch.manual_seed(global_seed)
        losses.append(make_loss()(Echo(), batch(), torch.Generator().manual_seed(seed))["loss"])
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_prior_preservation_adds_the_class():
    class_latents = TensorDataset(*batch(5, seed=1))
    class_condition = condition_of(torch.zeros(1, 3, 2))
    loss = make_loss(class_latents=class_latents, class_condition=class_condition, prior_loss_weight=0.25)
    model = Echo()
    found = loss(model, batch(), torch.Generator().manual_seed(3))
    alone = make_loss()(Echo(), batch(), torch.Generator().manual_seed(3))
    assert found["instance"] == alone["loss"]
    torch.testing.assert_close(found["loss"], found["instance"] + 0.25 * found["prior"])
    assert [seen["embeds"].unique().tolist() for seen in model.seen] == [[1.0], [0.0]]
    assert model.seen[1]["added"] is None


@pytest.mark.parametrize("kind", ["sample", "flow"])
def test_other_predictions_are_refused(kind):
    scheduler = DDPMScheduler(prediction_type=kind)
    for check in (check_prediction_type, lambda s: DreamBoothLoss(s, None)):
        with pytest.raises(ValueError, match=f"'epsilon' or 'v_prediction', got '{kind}'"):
            check(scheduler)


def test_a_scheduler_of_another_kind_is_refused():
    for check in (check_prediction_type, lambda s: DreamBoothLoss(s, None)):
        with pytest.raises(ValueError, match="scheduler"):
            check(EDMEulerScheduler())


def test_min_snr_at_noise_alone():
    def weighted(kind):
        scheduler = DDPMScheduler(prediction_type=kind, rescale_betas_zero_snr=True)
        condition = condition_of(torch.ones(1, 3, 2))
        loss = DreamBoothLoss(scheduler, condition, snr_gamma=5.0)
        generator = torch.Generator().manual_seed(0)
        return loss(Echo(), batch(64), generator)["loss"]

    assert weighted("v_prediction").isfinite()
    with pytest.raises(ValueError, match="`snr_gamma` must be None"):
        weighted("epsilon")


def test_class_pictures_are_drawn_where_they_are_missing(pipeline, tmp_path):
    def fill(folder, count, batch_size=2):
        return make_class_images(
            pipeline, tmp_path / folder, "a red one", count, batch_size=batch_size, seed=4,
            resolution=32, num_inference_steps=2, guidance_scale=2.0,
        )  # fmt: skip

    first = fill("first", 3)
    assert [path.name for path in first] == [f"class_0000{i}.png" for i in range(3)]
    contents = [path.read_bytes() for path in first]
    assert len(set(contents)) == 3
    first[0].unlink()
    assert [path.read_bytes() for path in fill("first", 3)] == contents
    save(tmp_path / "first" / "own.png")
    assert len(fill("first", 2)) == 4
    assert len(fill("first", 5)) == 5
    assert all(load_image(path, 32).std() > 0 for path in fill("first", 5))
