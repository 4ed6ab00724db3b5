"""What the evaluation of erasers shares with their training: one YAML file."""

from __future__ import annotations

from diffusers_ext.eraser.recipe import EraserSettings


ERASER_GROUPS = (EraserSettings,)
