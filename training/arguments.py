"""Argument groups that the scripts share; `training.config_file` parses them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from diffusers_ext.command_line.argument_parser import TRACEBACK_FLAG, add_overwrite_argument
from training.launcher_settings import PRECISIONS


DIRECTIONS = ("generalized", "null", "soft", "plain")


def add_traceback_argument(parser: argparse._ActionsContainer) -> None:
    """Errors are one line without it."""
    parser.add_argument(TRACEBACK_FLAG, action="store_true", help="show where an error came from")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Which base model, how it runs and where the results go."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--config", help="YAML file of arguments, one for all scripts; flags override it"
    )
    group.add_argument(
        "--pretrained_model_name_or_path",
        help="base model: folder, Hub name, or .safetensors file of Stable Diffusion or SDXL",
    )
    group.add_argument(
        "--single_file_config",
        help="folder or Hub name of a diffusers model whose configs and tokenizer a .safetensors file is "
        "read with; what diffusers infers without it",
    )
    group.add_argument("--revision", help="revision of the base model on the Hub")
    group.add_argument("--variant", help="variant of the weight files, e.g. fp16")
    group.add_argument("--output_dir", help="folder for everything this run writes")
    add_overwrite_argument(group)
    group.add_argument("--seed", type=int, default=0, help="seed of everything random")
    group.add_argument(
        "--mixed_precision",
        choices=PRECISIONS,
        help="of the frozen weights and of what is computed; accelerate's without it, else no",
    )
    add_traceback_argument(group)
    group.add_argument("--allow_tf32", action="store_true", help="faster on Ampere and newer")


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Loop, optimizer and checkpoints."""
    group = parser.add_argument_group("training")
    group.add_argument("--max_train_steps", type=int, default=600, help="optimizer steps")
    group.add_argument(
        "--train_batch_size", type=int, default=4, help="samples of a step in each process"
    )
    group.add_argument(
        "--gradient_accumulation_steps",
        type=int,
        help="batches of a step; accelerate's without it, else 1",
    )
    group.add_argument(
        "--gradient_checkpointing",
        action="store_true",
        help="compute activations again instead of keeping them",
    )
    group.add_argument(
        "--dataloader_num_workers", type=int, default=0, help="processes that load data"
    )
    group.add_argument(
        "--learning_rate", type=float, help="of AdamW; the script has its own without it"
    )
    group.add_argument(
        "--scale_lr", action="store_true", help="times processes, batch, accumulation"
    )
    group.add_argument("--lr_scheduler", default="constant", help="name of a diffusers schedule")
    group.add_argument("--lr_warmup_steps", type=int, default=0, help="steps until the full rate")
    group.add_argument("--adam_beta1", type=float, default=0.9, help="of AdamW")
    group.add_argument("--adam_beta2", type=float, default=0.999, help="of AdamW")
    group.add_argument("--adam_weight_decay", type=float, default=0.0, help="of AdamW")
    group.add_argument("--adam_epsilon", type=float, default=1e-8, help="of AdamW")
    group.add_argument(
        "--max_grad_norm", type=float, default=1.0, help="gradients are clipped to it"
    )
    group.add_argument("--checkpointing_steps", type=int, help="none are written without it")
    group.add_argument("--checkpoints_total_limit", type=int, help="older ones are removed")


def add_resume_argument(parser: argparse.ArgumentParser) -> None:
    """How a stopped run goes on."""
    parser.add_argument(
        "--resume_from_checkpoint", help="'latest', or one of the folders that a run leaves"
    )


def add_reporting_arguments(parser: argparse.ArgumentParser) -> None:
    """Logs and validation pictures."""
    group = parser.add_argument_group("reporting")
    group.add_argument("--report_to", help="tensorboard, wandb, ...; nothing without it")
    group.add_argument("--logging_dir", default="logs", help="below the output folder")
    group.add_argument("--logging_steps", type=int, default=10, help="steps between two log lines")
    group.add_argument("--validation_prompt", action="append", default=[], help="may be repeated")
    group.add_argument("--num_validation_images", type=int, default=4, help="a prompt")
    group.add_argument("--validation_steps", type=int, help="only at the end without it")


def add_hub_arguments(parser: argparse.ArgumentParser) -> None:
    """Upload of the result."""
    group = parser.add_argument_group("hub")
    group.add_argument(
        "--push_to_hub", action="store_true", help="upload the result with a model card"
    )
    group.add_argument("--hub_model_id", help="repository; the output folder's name without it")
    group.add_argument("--hub_token", help="taken from the login without it")
    group.add_argument(
        "--hub_private_repo", action="store_true", help="make a new repository private"
    )
    group.add_argument(
        "--hub_license", help="of the result, e.g. apache-2.0; the base model's own without it"
    )
    group.add_argument("--hub_license_name", help="of a licence that is `other` on the Hub")
    group.add_argument("--hub_license_link", help="its address")
    group.add_argument(
        "--hub_base_model", help="Hub name of the base model, where that is a folder here"
    )


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """How pictures are drawn, wherever a script draws any."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--negative_prompt", default="", help="of sampling")
    group.add_argument("--num_inference_steps", type=int, default=50, help="of sampling")
    group.add_argument("--guidance_scale", type=float, default=7.5, help="of sampling")


def add_knowledge_arguments(parser: argparse.ArgumentParser) -> None:
    """What is preserved and how it is measured."""
    group = parser.add_argument_group("knowledge")
    group.add_argument("--knowledge_prompts", help="text file, one prompt a line, # comments")
    group.add_argument(
        "--other_instance_prompts",
        action="append",
        default=[],
        help="of other subjects, to be kept free; may be repeated",
    )
    group.add_argument(
        "--features", nargs="+", default=["k", "v"], help="inputs of which projections: k v q out"
    )
    group.add_argument("--cross_attention_layers", nargs="+", default="all", help="all, or indices")
    group.add_argument(
        "--no_sub_phrases", action="store_true", help="preserve the prompts alone, not their parts"
    )
    group.add_argument("--statistics_batch_size", type=int, default=4, help="prompts at once")
    group.add_argument("--nullspace_threshold", type=float, help="absolute eigenvalue limit")


def add_covariance_arguments(parser: argparse.ArgumentParser) -> None:
    """What is made of collected statistics."""
    group = parser.add_argument_group("statistics")
    group.add_argument("--compress", type=float, help="keep this share of the energy, e.g. 0.999")
    group.add_argument(
        "--export_layout",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="also as a tree of npy files",
    )
    group.add_argument(
        "--layout_timesteps",
        nargs="+",
        help="of the tree: all (that the run visits), or numbers; 0 without it",
    )
    group.add_argument(
        "--layout_dir", default="layout", help="folder of the tree, below the output folder"
    )
    group.add_argument(
        "--visual_attention_map",
        action="store_true",
        help="draw attention maps, of every timestep and layer",
    )
    group.add_argument("--num_attention_maps", type=int, default=4, help="of the first prompts")


def add_attention_argument(parser: argparse.ArgumentParser) -> None:
    """How the UNet computes attention."""
    parser.add_argument(
        "--enable_xformers_memory_efficient_attention",
        action="store_true",
        help="xFormers in place of PyTorch's own memory-efficient attention",
    )


def add_subject_arguments(parser: argparse.ArgumentParser) -> None:
    """What is taught."""
    group = parser.add_argument_group("subject")
    group.add_argument("--instance_data_dir", help="folder with pictures of the subject")
    group.add_argument("--instance_prompt", help='e.g. "a photo of sks dog"')
    group.add_argument(
        "--resolution", type=int, help="pixels a side of pictures; the model's own without it"
    )
    group.add_argument("--no_center_crop", action="store_true", help="squeeze in place of cropping")
    group.add_argument("--random_flip", action="store_true", help="mirror half of the pictures")
    group.add_argument(
        "--snr_gamma", type=float, help="Min-SNR weighting of the loss, usually 5; none without it"
    )
    group.add_argument(
        "--with_prior_preservation", action="store_true", help="also train on pictures of the class"
    )
    group.add_argument("--class_data_dir", help="their folder; missing ones are drawn")
    group.add_argument("--class_prompt", help='e.g. "a photo of a dog"')
    group.add_argument("--num_class_images", type=int, default=100, help="pictures of the class")
    group.add_argument("--prior_loss_weight", type=float, default=1.0, help="of their loss")


def add_null_space_arguments(parser: argparse.ArgumentParser) -> None:
    """Which directions train."""
    group = parser.add_argument_group("null space")
    group.add_argument("--statistics", help="folder or Hub name of feature statistics")
    group.add_argument(
        "--directions", choices=DIRECTIONS, default="generalized", help="which ones may change"
    )
    group.add_argument("--rank", type=int, default=1, help="directions a layer")
    group.add_argument("--eps", type=float, default=1e-4, help="of the generalised problem")
    group.add_argument("--null_energy", type=float, help="share of energy left unprotected")
    group.add_argument(
        "--preservation_weight", type=float, default=100.0, help="of soft directions"
    )
    group.add_argument("--lora_dropout", type=float, default=0.0, help="of the LoRA's input")
    group.add_argument("--lora_bias", default="none", help="only none: a bias breaks preservation")
    group.add_argument("--use_dora", action="store_true", help="refused: it breaks preservation")
    group.add_argument(
        "--full_finetune", action="store_true", help="train whole weights, projected"
    )
    group.add_argument(
        "--enable",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="--no-enable is ordinary DreamBooth",
    )


def add_evaluation_arguments(parser: argparse.ArgumentParser) -> None:
    """What is drawn and by what it is judged."""
    group = parser.add_argument_group("evaluation")
    group.add_argument("--lora", action="append", help="folder or file; may be repeated")
    group.add_argument("--knowledge_prompts", help="text file, one prompt a line, # comments")
    group.add_argument("--held_out_prompts", help="text file of knowledge not in the statistics")
    group.add_argument("--subject_prompt", action="append", default=[], help="may be repeated")
    group.add_argument("--subject_data_dir", help="pictures of the real subject, for similarity")
    group.add_argument("--judge", help="module:attribute, imported; see training/plugins.py")
    group.add_argument("--subject_judge", help="the same for the subject prompts")
    group.add_argument("--dino", help="DINOv2 for features: folder or Hub name")
    group.add_argument("--clip", help="CLIP for scores, and features without DINOv2")
    group.add_argument("--pixel_features", action="store_true", help="pixels as features")
    group.add_argument("--distribution", action="store_true", help="also compare distributions")
    group.add_argument("--num_images_per_prompt", type=int, default=4, help="seeds a prompt")
    group.add_argument("--batch_size", type=int, default=8, help="pictures at once")
    group.add_argument("--height", type=int, help="the model's own without it")
    group.add_argument("--width", type=int, help="the model's own without it")
    group.add_argument("--sheet_prompts", type=int, default=16, help="rows of the sheet per group")


def read_layers(value: str | Sequence[int | str]) -> str | list[int]:
    """`--cross_attention_layers` as `"all"` or a list of indices."""
    if value == "all" or list(value) == ["all"]:
        return "all"
    try:
        return [int(index) for index in value]
    except ValueError as error:
        raise ValueError(
            f"`cross_attention_layers` must be 'all' or indices, got {value}."
        ) from error


NULL_SPACE_GROUPS = (
    add_model_arguments,
    add_training_arguments,
    add_resume_argument,
    add_reporting_arguments,
    add_hub_arguments,
    add_sampling_arguments,
    add_knowledge_arguments,
    add_covariance_arguments,
    add_attention_argument,
    add_subject_arguments,
    add_null_space_arguments,
    add_evaluation_arguments,
)


def read_timesteps(value: Sequence[str] | None) -> str | list[int] | None:
    """`--layout_timesteps` as `"all"`, or different numbers that are not negative; `None` as it is."""
    if value is None or list(value) == ["all"]:
        return value if value is None else "all"
    try:
        timesteps = [int(timestep) for timestep in value]
    except ValueError as error:
        raise ValueError(f"`layout_timesteps` must be 'all' or numbers, got {value}.") from error
    if min(timesteps) < 0 or len(set(timesteps)) < len(timesteps):
        raise ValueError(f"`layout_timesteps` must be different and not negative, got {timesteps}.")
    return timesteps


def argument_names(groups: Sequence[Callable[[argparse.ArgumentParser], None]]) -> set[str]:
    """Names of all arguments of some groups."""
    parser = argparse.ArgumentParser(conflict_handler="resolve", add_help=False)
    for add_group in groups:
        add_group(parser)
    return {action.dest for action in parser._actions}
