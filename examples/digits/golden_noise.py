"""Golden noise for the digits model: its prompts, its pairs, and how each network is trained on them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from diffusers_ext.training import pairs as generate_npd
from examples.digits.check_model import MODEL_DIR
from examples.digits.prompts import HELD_OUT_PAIRS, HELD_OUT_TEMPLATE, TEMPLATES, TRAINING_PAIRS, prompt_pairs
from training import train_noise_sequence, train_npnet

REWARD, SECOND_REWARD = (f"examples.digits.rewards:{n}DigitsReward" for n in ("", "Second"))
# Few steps and little guidance leave room for better noise; with 20 steps at 3 every digit is right.
GUIDANCE_SCALE = 1.5
TRAINING_PROMPTS = [p for template in TEMPLATES for p in prompt_pairs(template, TRAINING_PAIRS)]
HELD_OUT_PROMPTS = [
    *(p for template in TEMPLATES for p in prompt_pairs(template, HELD_OUT_PAIRS)),
    *prompt_pairs(HELD_OUT_TEMPLATE, (*TRAINING_PAIRS, *HELD_OUT_PAIRS)),
]

_COMMON = ("--lr_scheduler", "cosine", "--lr_warmup_steps", "100", "--learning_rate", "1e-3",
           "--text_cache_dtype", "fp32")  # fmt: skip
_MODEL = ("--train_batch_size", "64", "--patch_size", "2", "--width", "128", "--num_layers", "6",
          "--num_heads", "4")  # fmt: skip
_LOW_BANDS = ("--train_batch_size", "64", "--patch_size", "3", "--width", "64", "--num_layers", "3",
              "--num_heads", "4", "--bands", "6", "--use_ema", "--ema_decay", "0.995")  # fmt: skip
_NPNET = ("--train_batch_size", "64", "--swin_image_size", "16", "--swin_patch_size", "2",
          "--swin_embed_dim", "24", "--swin_depths", "2", "2", "--swin_num_heads", "2", "4",
          "--swin_window_size", "4", "--svd_hidden_dim", "32", "--svd_output_dim", "64",
          "--svd_num_heads", "2")  # fmt: skip
_TRANSFORMER = ("--train_batch_size", "16", "--patch_size", "2", "--d_model", "128", "--nhead", "4",
                "--num_encoder_layers", "1", "--num_decoder_layers", "4",
                "--dim_feedforward", "256")  # fmt: skip
_RNN = ("--train_batch_size", "16", "--cnn_base_filters", "48", "--cnn_num_blocks", "1", "1",
        "--cnn_feat_dim", "128", "--gru_hidden_size", "128", "--gru_num_layers", "1",
        "--num_attention_layers", "2", "--num_attention_heads", "4",
        "--num_text_layers", "1")  # fmt: skip
# Pictures of five steps resemble each other; this share of the prompt's mean taken out keeps them apart.
_DIVERSE = ("--remove_prompt_mean", "0.7")
# `--model`, data (pairs or sequences), steps of a full training, flags.
NETWORKS: dict[str, tuple[str, str, int, tuple[str, ...]]] = {
    "GoldenNoiseModel": ("golden_noise_model", "pairs", 2500, _MODEL),
    "NPNet": ("npnet", "pairs", 5000, _NPNET),
    "NoiseSequenceTransformer": ("transformer", "sequences", 1500, _TRANSFORMER),
    "NoiseSequenceRNN": ("rnn", "sequences", 1500, _RNN),
    "GoldenNoiseModel of five steps": ("golden_noise_model", "sequences", 2500, _MODEL),
    "NoiseSequenceTransformer, diverse": (
        "transformer", "sequences", 1500, (*_TRANSFORMER, *_DIVERSE)),
    "NoiseSequenceRNN, diverse": ("rnn", "sequences", 1500, (*_RNN, *_DIVERSE)),
    "GoldenNoiseModel of five steps, diverse": (
        "golden_noise_model", "sequences", 2500, (*_MODEL, *_DIVERSE)),
    "GoldenNoiseModel of low bands": ("golden_noise_model", "pairs", 3500, _LOW_BANDS),
}  # fmt: skip


def write_prompts(path: str | Path, prompts: Sequence[str]) -> Path:
    """Write a prompts file; returns its path."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("\n".join(prompts) + "\n")
    return Path(path)


def make_pairs(folder: str | Path, *, num_steps: int, noises_per_prompt: int) -> Path:
    """Pairs that the reward has filtered (`num_steps=1`), or unfiltered sequences; returns the folder.

    Sequences are kept whole: what a prompt loses with one of their steps it wins with another.
    """
    prompts = write_prompts(Path(folder).with_suffix(".txt"), TRAINING_PROMPTS)
    command = [
        "--pretrained_model_name_or_path", str(MODEL_DIR), "--prompt_file", str(prompts),
        "--noises_per_prompt", str(noises_per_prompt), "--num_steps", str(num_steps),
        "--guidance_scale", str(GUIDANCE_SCALE), "--num_inference_steps", "6",
        "--batch_size", "100", "--shard_size", "500", "--seed", "1000000",
        "--output_dir", str(folder),
    ]  # fmt: skip
    filtered = ["--reward", REWARD] if num_steps == 1 else ["--no_filter"]
    return generate_npd.main(generate_npd.parse_args(command + filtered))


def train_network(name: str, data: str | Path, folder: str | Path, *, steps: int | None = None, seed: int = 0) -> Path:
    """Train one of `NETWORKS` on a folder of `make_pairs`; returns the network's folder."""
    model, _, full_steps, flags = NETWORKS[name]
    is_pair = model in ("npnet", "golden_noise_model")
    script = train_npnet if is_pair else train_noise_sequence
    command = [
        "--model", model, "--pretrained_model_name_or_path", str(MODEL_DIR),
        "--dataset_dir", str(data), "--max_train_steps", str(steps or full_steps),
        "--seed", str(seed), *_COMMON, *flags, "--output_dir", str(folder),
    ]  # fmt: skip
    return script.main(script.parse_args(command))
