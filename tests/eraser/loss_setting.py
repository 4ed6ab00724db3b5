"""What the tests of the losses share: a tiny student and teacher, and their plain answers."""

from __future__ import annotations

import torch

from diffusers_ext.eraser.adapter.outputs import erasers_disabled
from diffusers_ext.families.cogvideox import CogVideoXVelocity
from tests.eraser.erased_models import erased_pipeline, random_rows

ETA = 2.0


class Setting:
    """A velocity, inputs, and the plain answers of teacher and student, one call each."""

    def __init__(self, kind="rotary", batch=2):
        self.velocity = CogVideoXVelocity.from_pipeline(erased_pipeline(kind), 9, 16, 16)
        self.transformer = self.velocity.transformer
        frames = 4 if kind == "1.5" else 3
        self.x_t, self.t, self.target = random_rows(batch, frames)
        self.anchor, self.preserve = (random_rows(batch, seed=seed)[2] for seed in (1, 2))
        self.grid = (frames // 2, 2, 2) if kind == "1.5" else (frames, 4, 4)
        self.mask = torch.rand(batch, *self.grid, dtype=torch.float64)
        with torch.no_grad():
            self.student_target = self.student(self.target)
            self.student_preserve = self.student(self.preserve)
            with erasers_disabled(self.transformer):
                self.v_concept, self.v_anchor, self.v_preserve = (
                    self.student(embeds) for embeds in (self.target, self.anchor, self.preserve)
                )

    def student(self, embeds):
        return self.velocity(self.x_t, self.t, embeds)

    @property
    def inputs(self):
        return self.velocity, self.velocity, self.x_t, self.t, self.target


def assert_only_the_eraser_has_gradient(model):
    for name, parameter in model.named_parameters():
        if "eraser_" in name:
            assert parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name


def count_calls(velocity):
    calls = []
    velocity.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((len(kwargs["timestep"]), torch.is_grad_enabled())), with_kwargs=True
    )
    return calls
