"""Which options of a PEFT LoRA leave the outputs on preserved inputs alone."""

from __future__ import annotations

from peft import LoraConfig


# Harmless options, and those that the caller of `check_lora_config` sets by itself.
_FREE = {"lora_dropout", "exclude_modules", "init_lora_weights"}
_SET_LATER = {"r", "lora_alpha", "use_rslora", "target_modules"}


def check_lora_config(config: LoraConfig) -> None:
    """Raise `ValueError` for LoRA options that break `D x = 0` on preserved inputs."""
    if config.use_dora:
        raise ValueError(
            "`use_dora` must be False, got True: DoRA rescales each row by the norm of W + D, which "
            "changes the outputs on preserved inputs."
        )
    if config.bias != "none":
        raise ValueError(
            f"`bias` must be 'none', got {config.bias!r}: a bias acts on every input, preserved or not."
        )
    if config.init_lora_weights not in (True, False, "gaussian"):
        raise ValueError(
            "`init_lora_weights` must be True, False or 'gaussian', got "
            f"{config.init_lora_weights!r}: other ways need more than A and B."
        )
    usual = LoraConfig().to_dict()
    for name, value in config.to_dict().items():
        if name not in _FREE | _SET_LATER and value != usual[name]:
            raise ValueError(
                f"`{name}` must be left at {usual[name]!r}, got {value!r}: only A and B of the "
                "constrained layers may change."
            )
