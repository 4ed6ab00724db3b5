"""What an eraser of a pretrained model is trained with where nothing is given."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

from diffusers_ext.eraser.recipe import EraserSettings, EraserTraining

REAL_MODEL_DEFAULTS: dict[str, Any] = {
    **asdict(EraserTraining()),
    **{
        one.name: one.default
        for one in fields(EraserSettings)
        if one.name in {of.name for of in fields(EraserTraining)} and one.default is not None
    },
}
