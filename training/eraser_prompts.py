"""The reader of an eraser's prompts, under the name that it had before `diffusers_ext.training`."""

from diffusers_ext.training.eraser.prompts import read_eraser_prompts

__all__ = ["read_eraser_prompts"]
