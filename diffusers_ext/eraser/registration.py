"""Make `ERASER` known to PEFT; importing this module is enough."""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method

from diffusers_ext.eraser.config import PEFT_TYPE_NAME, EraserConfig, eraser_peft_type
from diffusers_ext.eraser.model import EraserModel


def register_eraser() -> None:
    """Register `EraserConfig` and `EraserModel` with PEFT as `ERASER`; a second call does nothing.

    Raises:
        RuntimeError: another package has registered a method of that name.
    """
    registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(eraser_peft_type())
    if registered is None:
        register_peft_method(
            name=PEFT_TYPE_NAME.lower(),
            config_cls=EraserConfig,
            model_cls=EraserModel,
            prefix=EraserModel.prefix,
        )
    elif registered.__module__ != EraserConfig.__module__:
        raise RuntimeError(
            f"The PEFT type {PEFT_TYPE_NAME} must be free, got {registered.__module__}."
            f"{registered.__qualname__} registered for it. Import only one of the two packages."
        )


register_eraser()
