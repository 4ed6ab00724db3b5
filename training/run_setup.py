"""The accelerator of a run, under the name that it had before `diffusers_ext.training`."""

from diffusers_ext.training.run.setup import make_accelerator

__all__ = ["make_accelerator"]
