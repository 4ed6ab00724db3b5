"""Where in time and depth learned embeddings bring an erased digit back, on the bundled moving digits.

python benchmarks/where_concepts_return.py --target seven --eraser outputs/erasure/eraser_seven_0
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import CogVideoXPipeline

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from benchmarks.machine import table, write_results
from benchmarks.revival_of_digits import attack_points
from diffusers_ext.eraser.attack import insert_embeddings, learn_revival_embeddings, revived_prompts
from diffusers_ext.eraser.files import load_eraser
from diffusers_ext.evaluation.rendering import render_clips
from diffusers_ext.families.family import Velocity
from diffusers_ext.training.eraser.data import ClipSize
from examples.moving_digits.check_model import SAMPLING, load_pipeline
from examples.moving_digits.clips import CANVAS, NUM_FRAMES
from examples.moving_digits.erasers import evaluation_groups, train_digits_eraser
from examples.moving_digits.judge import MovingDigitsJudge

SIZE = ClipSize(NUM_FRAMES, CANVAS, CANVAS)
SEED = 9_000
TIMES = (0, 200, 400, 600, 800, 1000)
SPLITS = (5, 10, 15)  # of 20 steps
States = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]  # x_t, t, prompts, the base's velocities


def base_states(pipeline: CogVideoXPipeline, target: str, clips: int) -> States:
    """What the base passes on its way to clips of the target."""
    points = attack_points(pipeline, target, clips)
    return points["x_t"].float(), points["t"], points["prompt_embeds"], points["v_concept"].float()


@torch.no_grad()
def distance(velocity: Velocity, states: States, embeddings: torch.Tensor | None, most: int = 64) -> float:
    """Mean squared distance to the base's velocities, with embeddings behind the prompts or without."""
    chosen = torch.linspace(0, len(states[1]) - 1, min(most, len(states[1]))).long()
    x_t, t, text, concept = (part[chosen] for part in states)
    if embeddings is not None:
        text = insert_embeddings(text, embeddings, velocity.config)
    return (velocity(x_t, t, text) - concept).square().mean().item()


@contextmanager
def hidden_from(blocks: Sequence[torch.nn.Module], layers: Sequence[int], count: int) -> Iterator[None]:
    """The last `count` text tokens pass by these layers, which read the token before them in their place."""
    aside: list[torch.Tensor] = []

    def hide(_: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        text = kwargs["encoder_hidden_states"]
        aside.append(text[:, -count:])
        before = text[:, -count - 1 : -count].expand(-1, count, -1)
        return args, {**kwargs, "encoder_hidden_states": torch.cat([text[:, :-count], before], dim=1)}

    def bring_back(_: Any, __: tuple, output: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        video, text = output
        return video, torch.cat([text[:, :-count], aside.pop()], dim=1)

    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(blocks[layer].register_forward_pre_hook(hide, with_kwargs=True).remove)
            hooks.callback(blocks[layer].register_forward_hook(bring_back).remove)
        yield


def by_time(velocity: Velocity, states: States, embeddings: torch.Tensor) -> list[list[str]]:
    """Distances to the base by timestep, without the embeddings and with them."""
    rows = []
    for low, high in zip(TIMES, TIMES[1:], strict=False):
        chosen = (states[1] >= low) & (states[1] < high)
        of_time = tuple(part[chosen] for part in states)
        found = [distance(velocity, of_time, given) for given in (None, embeddings)]
        rows.append([f"{low} to {high - 1}", *(f"{value:.4f}" for value in found), f"{found[1] / found[0]:.2f}"])
    return rows


def by_depth(velocity: Velocity, states: States, embeddings: torch.Tensor) -> list[list[str]]:
    """Distances to the base where only some layers read the embeddings."""
    blocks, rows = velocity.model.transformer_blocks, []
    every = range(len(blocks))
    readers = {"none": [], **{f"{n} alone": [n] for n in every}, **{f"all but {n}": [x for x in every if x != n]
               for n in every}, "all": list(every)}  # fmt: skip
    for name, reading in readers.items():
        with hidden_from(blocks, [layer for layer in every if layer not in reading], len(embeddings)):
            rows.append([name, f"{distance(velocity, states, embeddings):.4f}"])
    return rows


def by_steps(pipeline: CogVideoXPipeline, embeddings: torch.Tensor, target: str, clips: int) -> list[list[str]]:
    """Share of clips that show the target, with the embeddings in the first steps or in the last alone."""
    prompts = evaluation_groups(target, num_target=clips)["target"]
    config, count = pipeline.transformer.config, len(embeddings)

    def share(early: bool, split: int) -> float:
        def change(_: Any, step: int, __: Any, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            both = values["prompt_embeds"]
            if step + 1 != split:
                return {}
            if early:
                return {"prompt_embeds": both[:, :-count]}
            negative, positive = both.chunk(2)
            longer = torch.cat([negative, negative[:, -1:].expand(-1, count, -1)], dim=1)
            return {"prompt_embeds": torch.cat([longer, insert_embeddings(positive, embeddings, config)])}

        with ExitStack() as attack:
            if early:
                attack.enter_context(revived_prompts(pipeline, embeddings))
            drawn = render_clips(
                pipeline,
                prompts,
                seeds=range(SEED, SEED + clips),
                batch_size=50,
                callback_on_step_end=change,
                callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
                **SAMPLING,
            )
        return float(MovingDigitsJudge().correct(drawn, prompts)["digit"].mean())

    steps = SAMPLING["num_inference_steps"]
    return [
        [f"{split} of {steps}", f"{share(True, split):.2f}", f"{share(False, split):.2f}"]
        for split in (*SPLITS, steps)
    ]


def measure(pipeline: CogVideoXPipeline, target: str, *, steps: int, clips: int) -> tuple[dict[str, Any], str]:
    """All tables of one erased pipeline, as values and as Markdown."""
    states, velocity = base_states(pipeline, target, clips), SIZE.velocity(pipeline)
    found = learn_revival_embeddings(
        velocity, *states[:3], v_concept=states[3], steps=steps, batch_size=16, show_progress=False
    )
    tables = {
        "time": (["timesteps", "erased", "attacked", "ratio"], by_time(velocity, states, found.embeddings)),
        "depth": (["layers that read the embeddings", "attacked"], by_depth(velocity, states, found.embeddings)),
        "steps": (
            ["steps", f"{target} read, embeddings in these alone", "embeddings after these alone"],
            by_steps(pipeline, found.embeddings, target, clips),
        ),
    }  # fmt: skip
    text = "\n\n".join(table(*one) for one in tables.values())
    return {"losses": found.losses, **{name: rows for name, (_, rows) in tables.items()}}, text


def main(input_args: list[str] | None = None) -> None:
    """Print and write the tables of one target."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="seven")
    parser.add_argument("--eraser", type=Path, help="folder; one is trained without it")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--clips", type=int, default=48)
    args = parser.parse_args(input_args)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    pipeline = load_pipeline()
    if args.eraser is None:
        train_digits_eraser(pipeline, args.target)
    else:
        load_eraser(pipeline, args.eraser)
    found, text = measure(pipeline, args.target, steps=args.steps, clips=args.clips)
    text = f"Mean squared distance to the velocities of the base, {args.target} erased.\n\n{text}"
    write_results("where_concepts_return", {"target": args.target, "steps": args.steps, **found}, text)
    print(text)


if __name__ == "__main__":
    main()
