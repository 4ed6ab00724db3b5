"""What the evaluation of erasers shares with their training: one YAML file."""

from diffusers_ext.eraser.recipe import EraserSettings


ERASER_GROUPS = (EraserSettings,)
