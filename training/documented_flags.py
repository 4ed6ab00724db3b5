"""Flags that the design documents use and the scripts here call otherwise.

A script that has a flag of the same name takes it; this is for those that have not.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence


_FROM_THE_WEIGHTS = "nothing: the network's form is read from its file"

# Each with what stands for it.
DOCUMENTED_FLAGS = {
    # eraser
    "--model_path": "--pretrained_model_name_or_path",
    "--batch_size": "--train_batch_size",
    "--use_fp16": "--mixed_precision fp16, or bf16",
    "--use_cpu_offload": "nothing: it trains without the text encoder and keeps the VAE on the CPU; "
    "--gradient_checkpointing saves more",
    # golden noise
    "--npnet_weights_path": "--noise_model",
    "--evaluation_prompts_file": "--prompt_file",
    "--metrics": "--reward",
    "--npnet_model_id": _FROM_THE_WEIGHTS,
    "--svd_dropout": _FROM_THE_WEIGHTS,
    "--nt_adapter": _FROM_THE_WEIGHTS,
    "--nt_finetune": _FROM_THE_WEIGHTS,
    "--nt_dropout": _FROM_THE_WEIGHTS,
    "--cross_attention": _FROM_THE_WEIGHTS,
}


def replaced_flag(parser: argparse.ArgumentParser, input_args: Sequence[str]) -> str | None:
    """What to say about the first documented flag that `parser` has not; `None` without one.

    Args:
        parser: of a script; it takes abbreviations only where it allows them.
        input_args: command line.
    """
    known = {option for action in parser._actions for option in action.option_strings}
    for argument in input_args:
        flag = argument.partition("=")[0]
        use = DOCUMENTED_FLAGS.get(flag)
        if use is None or any(option.startswith(flag) for option in known):
            continue
        named = use.split()[0].rstrip(",")
        if not named.startswith("--") or named in known:
            return f"`{flag}` of the design documents is not known here; use {use}."
    return None
