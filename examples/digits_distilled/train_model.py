"""Distil the bundled digits model into one a quarter its size that draws in 1 to 4 steps without guidance.

python examples/digits_distilled/train_model.py --output_dir examples/digits_distilled/model

The teacher's guided DDIM trajectories are drawn once. The student learns the function that latent consistency models
learn (Luo et al., arXiv:2310.04378): from any point of a trajectory, with guidance folded in, to its end. Their target
is the student's own average a solver's step further on; here it is the end itself, as in Luhman & Luhman
(arXiv:2101.02388), for trajectories of eight steps cost less than what they replace. It draws with `LCMScheduler`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from torch.utils.data import TensorDataset
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a file, only this folder is on the path

from diffusers_ext.training.run.loop import LoopSettings, TrainingLoop
from examples.arguments import save_in_half_precision
from examples.digits.check_model import load_pipeline
from examples.digits.golden_noise import TRAINING_PROMPTS
from examples.digits.train_model import build_scheduler

MODEL_DIR = Path(__file__).parent / "model"
TEACHER_STEPS, TEACHER_GUIDANCE = 8, 3.0
FIRST_STEP_SHARE = 0.4  # of the points that are pure noise, which every number of steps begins with


class Trajectories(NamedTuple):
    """Guided runs of the teacher, `(runs, steps, 4, 8, 8)`, from noise to picture, and where each step stands."""

    x_t: torch.Tensor
    noise: torch.Tensor  # predicted, with guidance
    prompts: torch.Tensor  # (runs,) numbers of the prompts
    timesteps: torch.Tensor  # (steps,) falling

    def end(self, runs: torch.Tensor, alphas: torch.Tensor) -> torch.Tensor:
        """What the last step takes for the picture."""
        return clean_latents(self.x_t[runs, -1], self.noise[runs, -1], alphas[self.timesteps[-1]])

    def between(
        self, runs: torch.Tensor, steps: torch.Tensor, timesteps: torch.Tensor, alphas: torch.Tensor
    ) -> torch.Tensor:
        """Points of runs at timesteps from `steps` to the step after, on DDIM's straight line between them."""
        noise = self.noise[runs, steps]
        clean = clean_latents(self.x_t[runs, steps], noise, alphas[self.timesteps[steps]])
        return add_noise(clean, noise, alphas[timesteps])


def clean_latents(x_t: torch.Tensor, noise: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """`x_0` of `x_t` and the noise in it; `alpha` is the scheduler's cumulative product."""
    alpha = alpha.view(-1, 1, 1, 1)
    return (x_t - (1 - alpha).sqrt() * noise) / alpha.sqrt()


def add_noise(clean: torch.Tensor, noise: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """The way back from `clean_latents`."""
    alpha = alpha.view(-1, 1, 1, 1)
    return alpha.sqrt() * clean + (1 - alpha).sqrt() * noise


def encode(pipeline: StableDiffusionPipeline, prompts: list[str]) -> torch.Tensor:
    """Token embeddings `(prompts, tokens, width)`."""
    return pipeline.encode_prompt(prompts, pipeline.device, 1, False)[0]


@torch.no_grad()
def draw_trajectories(
    teacher: StableDiffusionPipeline, prompts: list[str], runs_per_prompt: int, generator: torch.Generator
) -> Trajectories:
    """Deterministic DDIM runs of `TEACHER_STEPS` steps at `TEACHER_GUIDANCE`; each starts from noise of its own."""
    alphas = teacher.scheduler.alphas_cumprod
    spacing = len(alphas) // TEACHER_STEPS
    timesteps = torch.arange(len(alphas) - 1, 0, -spacing)
    numbers = torch.arange(len(prompts)).repeat_interleave(runs_per_prompt)
    text, empty = encode(teacher, prompts), encode(teacher, [""])
    runs: list[tuple[torch.Tensor, torch.Tensor]] = []
    for batch in tqdm(numbers.split(100), desc="trajectories"):
        x_t = torch.randn(len(batch), 4, 8, 8, generator=generator)
        read = torch.cat([empty.expand(len(batch), -1, -1), text[batch]])
        states, noises = [], []
        for timestep, after in zip(timesteps, [*timesteps[1:], None], strict=True):
            plain, asked = teacher.unet(torch.cat([x_t, x_t]), timestep, read).sample.chunk(2)
            states.append(x_t)
            noises.append(plain + TEACHER_GUIDANCE * (asked - plain))
            if after is not None:
                x_t = add_noise(clean_latents(x_t, noises[-1], alphas[timestep]), noises[-1], alphas[after])
        runs.append((torch.stack(states, 1), torch.stack(noises, 1)))
    x_t, noise = (torch.cat(parts) for parts in zip(*runs, strict=True))
    return Trajectories(x_t, noise, numbers, timesteps)


def build_student() -> UNet2DConditionModel:
    """0.66 M parameters: it reads the prompt at the lower resolution alone."""
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 48),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def build_lcm_scheduler() -> LCMScheduler:
    """The teacher's noise schedule; the student predicts a velocity, which is as good at pure noise as elsewhere."""
    shared = {name: build_scheduler().config[name] for name in ("beta_start", "beta_end", "beta_schedule")}
    return LCMScheduler(
        **shared, clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type="v_prediction"
    )


def train_student(
    accelerator: Accelerator, runs: Trajectories, text: torch.Tensor, args: argparse.Namespace
) -> tuple[UNet2DConditionModel, list[dict[str, float]]]:
    """The student with averaged weights, and the log."""
    alphas = build_lcm_scheduler().alphas_cumprod
    last = len(alphas) - 1

    def loss_function(model: torch.nn.Module, batch: list, generator: torch.Generator) -> dict[str, torch.Tensor]:
        (index,) = batch
        timesteps = torch.randint(1, last + 1, index.shape, generator=generator)
        timesteps[torch.rand(index.shape, generator=generator) < FIRST_STEP_SHARE] = last
        steps = (last - timesteps) * TEACHER_STEPS // len(alphas)
        x_t = runs.between(index, steps, timesteps, alphas)
        alpha = alphas[timesteps].view(-1, 1, 1, 1)
        velocity = model(x_t, timesteps, text[runs.prompts[index]]).sample
        drawn = alpha.sqrt() * x_t - (1 - alpha).sqrt() * velocity
        return {"loss": F.mse_loss(drawn, runs.end(index, alphas))}

    student = build_student()
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3, weight_decay=1e-3)
    schedule = get_cosine_schedule_with_warmup(optimizer, 100, args.max_train_steps)
    ema = EMAModel(student.parameters(), decay=0.995)
    dataset = TensorDataset(torch.arange(len(runs.prompts)))
    settings = LoopSettings(
        args.max_train_steps, train_batch_size=48, seed=args.seed, logging_steps=50, description="student"
    )
    loop = TrainingLoop(accelerator, student, optimizer, dataset, loss_function, settings, schedule, ema=ema)
    loop.run().eval()
    ema.copy_to(student.parameters())
    return student, loop.history


def main(input_args: list[str] | None = None) -> None:
    """Draw the trajectories, train on them and save the pipeline in float16, with the log beside it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=MODEL_DIR)
    parser.add_argument("--runs_per_prompt", type=int, default=6, help="of the teacher, of 200 prompts")
    parser.add_argument("--max_train_steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(input_args)
    began = time.perf_counter()
    accelerator = Accelerator(cpu=True)
    set_seed(args.seed)
    teacher = load_pipeline()
    generator = torch.Generator().manual_seed(args.seed)
    runs = draw_trajectories(teacher, TRAINING_PROMPTS, args.runs_per_prompt, generator)
    drawn = time.perf_counter() - began
    with torch.no_grad():
        text = encode(teacher, TRAINING_PROMPTS)
    student, history = train_student(accelerator, runs, text, args)
    pipeline = StableDiffusionPipeline(
        teacher.vae, teacher.text_encoder, teacher.tokenizer, student, build_lcm_scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    save_in_half_precision(pipeline, args.output_dir)
    seconds = {"trajectories": drawn, "all": time.perf_counter() - began, "processor": time.process_time()}
    log = {
        "seconds": {name: round(value) for name, value in seconds.items()},
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "arguments": {name: str(value) for name, value in vars(args).items() if isinstance(value, int)},
        "denoiser": history,
    }
    (args.output_dir.parent / "train_log.json").write_text(json.dumps(log, indent=1) + "\n")


if __name__ == "__main__":
    main()
