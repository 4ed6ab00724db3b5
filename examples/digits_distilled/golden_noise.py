"""Golden noise for the distilled digits, which have no guidance: targets by a reward, and networks trained on them."""

from __future__ import annotations

from pathlib import Path

from diffusers_ext.training import pairs as generate_npd
from examples.digits.golden_noise import REWARD, TRAINING_PROMPTS, write_prompts
from examples.digits_distilled.train_model import MODEL_DIR
from training import train_npnet

NUM_STEPS = 2  # of denoising
_DRAWING = ("--num_inference_steps", str(NUM_STEPS), "--guidance_scale", "1.0", "--reward", REWARD)
_NETWORK = ("--model", "golden_noise_model", "--patch_size", "2", "--width", "128", "--num_layers", "4",
            "--num_heads", "4", "--text_cache_dtype", "fp32", "--lr_scheduler", "cosine",
            "--lr_warmup_steps", "30")  # fmt: skip
# Of the pairs of each target: noises a prompt, steps of the network's training, flags besides those that all have.
PAIRS: dict[str, tuple[int, int, tuple[str, ...]]] = {
    "reward pairs": (3, 400, ("--target", "reward", "--ascent_steps", "6", "--ascent_rate", "0.1")),
    "chosen of 8 neighbours": (2, 200, ("--target", "best_of_n", "--best_of", "8", "--spread", "0.5")),
}
# The same of pairs that spread the pictures of a prompt; what may be lost of the reward is next to nothing.
_SPREAD = ("--target", "diversity", "--diversity_gain", "4", "--ascent_steps", "6", "--ascent_rate", "0.12")
DIVERSE: dict[str, tuple[int, int, tuple[str, ...]]] = {"spread pairs": (10, 400, (*_SPREAD, "--margin", "-0.002"))}
# Of trainings without pairs: steps, flags. The second keeps nearer to the seeds, and with that more of their variety.
DIRECT: dict[str, tuple[int, tuple[str, ...]]] = {
    "direct": (220, ("--reward_regularization", "0.5")),
    "direct, nearer": (220, ("--reward_regularization", "1.5")),
}


def make_pairs(name: str, folder: str | Path) -> Path:
    """The pairs of one of `PAIRS` or `DIVERSE`, filtered by the reward; returns the folder."""
    noises, _, flags = (PAIRS | DIVERSE)[name]
    command = [
        "--pretrained_model_name_or_path", str(MODEL_DIR), "--prompt_file", str(prompt_file(folder)),
        "--noises_per_prompt", str(noises), "--batch_size", "100", "--shard_size", "500",
        "--seed", "1000000", *_DRAWING, *flags, "--output_dir", str(folder),
    ]  # fmt: skip
    return generate_npd.main(generate_npd.parse_args(command))


def train_network(name: str, folder: str | Path, *, data: str | Path | None, seed: int = 0) -> Path:
    """Train a network on the pairs in `data`, or one of `DIRECT` by the reward itself; returns its folder."""
    steps = (PAIRS | DIVERSE)[name][1] if data is not None else DIRECT[name][0]
    command = ["--pretrained_model_name_or_path", str(MODEL_DIR), "--max_train_steps", str(steps),
               "--seed", str(seed), *_NETWORK, "--output_dir", str(folder)]  # fmt: skip
    if data is not None:
        command += ["--dataset_dir", str(data), "--train_batch_size", "64", "--learning_rate", "1e-3"]
    else:
        command += ["--objective", "reward", "--prompt_file", str(prompt_file(folder)), "--train_batch_size", "32",
                    "--learning_rate", "2e-3", *_DRAWING, *DIRECT[name][1]]  # fmt: skip
    return train_npnet.main(train_npnet.parse_args(command))


def prompt_file(folder: str | Path) -> Path:
    """The training prompts, written beside a folder."""
    return write_prompts(Path(folder).with_name(f"{Path(folder).name}.txt"), TRAINING_PROMPTS)
