"""Teach a Stable Diffusion or SDXL model a new subject without forgetting what it knows.

    accelerate launch training/train_nullspace_dreambooth.py \\
        --pretrained_model_name_or_path examples/digits/model \\
        --instance_data_dir pictures --instance_prompt "a photo of sks" \\
        --knowledge_prompts knowledge.txt --resolution 32 --output_dir outputs/subject
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from accelerate.logging import get_logger
from peft import LoraConfig


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # found by path, from any folder

from diffusers_ext.core.artifacts import fingerprint
from diffusers_ext.nullspace.lora import check_lora_config
from diffusers_ext.nullspace.projected_update import ProjectedUpdate
from training.arguments import (
    add_knowledge_arguments,
    add_model_arguments,
    add_reporting_arguments,
    add_training_arguments,
    parse_arguments,
    read_nullbooth_block,
)
from training.checkpoints import Checkpoints, find_checkpoint
from training.dreambooth import encode_images, list_images
from training.knowledge import load_or_collect, load_pipeline
from training.loop import TrainingLoop
from training.publish import Validation, publish
from training.run_setup import (
    WEIGHT_DTYPES,
    loop_settings,
    make_accelerator,
    make_optimizer,
    make_schedule,
    run_facts,
    start_trackers,
)
from training.subject import (
    add_lora,
    free_constrained_weights,
    keep_rule,
    make_loss,
    save_result,
)


logger = get_logger(__name__)

DIRECTIONS = ("generalized", "null", "soft", "plain")
# Frozen directions have unit energy, so B holds output changes; a plain LoRA's B is far smaller.
_DEFAULT_RATES = {"generalized": 3e-2, "null": 3e-2, "soft": 1e-3, "plain": 1e-3}


def parse_args(input_args: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line of this script, over the YAML file of `--config`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser)
    add_training_arguments(parser)
    add_reporting_arguments(parser)
    add_knowledge_arguments(parser)
    group = parser.add_argument_group("subject")
    group.add_argument("--instance_data_dir", help="folder with pictures of the subject")
    group.add_argument("--instance_prompt", help='e.g. "a photo of sks dog"')
    group.add_argument("--resolution", type=int, default=512)
    group.add_argument("--no_center_crop", action="store_true", help="squeeze in place of cropping")
    group.add_argument("--random_flip", action="store_true")
    group.add_argument("--snr_gamma", type=float)
    group.add_argument("--with_prior_preservation", action="store_true")
    group.add_argument("--class_data_dir")
    group.add_argument("--class_prompt")
    group.add_argument("--num_class_images", type=int, default=100)
    group.add_argument("--prior_loss_weight", type=float, default=1.0)
    group = parser.add_argument_group("null space")
    group.add_argument("--statistics", help="folder or Hub name of feature statistics")
    group.add_argument("--directions", choices=DIRECTIONS, default="generalized")
    group.add_argument("--rank", type=int, default=1)
    group.add_argument("--eps", type=float, default=1e-4, help="of the generalised problem")
    group.add_argument("--null_energy", type=float, help="share of energy left unprotected")
    group.add_argument(
        "--preservation_weight", type=float, default=100.0, help="of soft directions"
    )
    group.add_argument("--lora_dropout", type=float, default=0.0)
    group.add_argument("--lora_bias", default="none")
    group.add_argument("--use_dora", action="store_true", help="refused: it breaks preservation")
    group.add_argument(
        "--full_finetune", action="store_true", help="train whole weights, projected"
    )
    parser.add_argument("--enable", type=bool, default=True, help=argparse.SUPPRESS)
    parser.add_argument("--visual_attention_map", action="store_true", help=argparse.SUPPRESS)
    required = (
        "pretrained_model_name_or_path", "instance_data_dir", "instance_prompt", "output_dir",
    )  # fmt: skip
    args = parse_arguments(parser, input_args, required, read_nullbooth_block)
    if not args.enable:  # `nullbooth: {enable: false}` is ordinary DreamBooth
        args.directions = "plain"
    if args.learning_rate is None:
        args.learning_rate = 1e-4 if args.full_finetune else _DEFAULT_RATES[args.directions]
    return args


def check_args(args: argparse.Namespace) -> None:
    """Everything that can be wrong without loading a model."""
    check_lora_config(LoraConfig(use_dora=args.use_dora, bias=args.lora_bias))
    list_images(args.instance_data_dir)
    if args.resume_from_checkpoint:
        find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    if args.with_prior_preservation and not (args.class_data_dir and args.class_prompt):
        raise ValueError(
            "`--class_data_dir` and `--class_prompt` must be given with `--with_prior_preservation`."
        )
    if args.full_finetune and args.directions == "plain":
        raise ValueError("`--full_finetune` must be constrained, got `--directions plain`.")
    if args.resolution % 8:
        raise ValueError(f"`resolution` must be a multiple of 8, got {args.resolution}.")


def hash_files(paths: Sequence[Path]) -> str:
    """SHA-256 over the contents of files, in order."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def main(args: argparse.Namespace) -> Path:
    """Train and save; returns the output folder."""
    check_args(args)
    accelerator = make_accelerator(args)
    pipeline = load_pipeline(args, accelerator.device, WEIGHT_DTYPES[args.mixed_precision])
    plain = args.directions == "plain"
    statistics = None if plain else load_or_collect(args, pipeline, accelerator)
    images = list_images(args.instance_data_dir)
    dataset = encode_images(
        pipeline,
        images,
        args.resolution,
        center_crop=not args.no_center_crop,
        flip=args.random_flip,
    )
    loss_function = make_loss(args, pipeline, accelerator, statistics)
    facts = run_facts(
        args,
        model=fingerprint(pipeline.unet),
        pictures=hash_files(images),
        instance_prompt=args.instance_prompt,
        directions=args.directions,
        rank=args.rank,
        full_finetune=args.full_finetune,
        knowledge=None if plain else statistics.facts,
    )
    projections, direction_report = {}, []
    if args.full_finetune:
        projections = free_constrained_weights(args, pipeline.unet, statistics)
    else:
        direction_report = add_lora(args, pipeline, statistics)
        for row in direction_report:
            logger.info(f"Directions: {row}")
    if args.gradient_checkpointing:
        pipeline.unet.enable_gradient_checkpointing()
    trained = [p for p in pipeline.unet.parameters() if p.requires_grad]
    optimizer = make_optimizer(args, trained, accelerator)
    validation = Validation(args, pipeline, accelerator)
    loop = TrainingLoop(
        accelerator,
        pipeline.unet,
        optimizer,
        dataset,
        loss_function,
        loop_settings(args, f"{args.directions} training"),
        make_schedule(args, optimizer),
        checkpoints=Checkpoints(
            accelerator,
            args.output_dir,
            facts,
            args.checkpointing_steps,
            args.checkpoints_total_limit,
            keep_rule(args),
        ),
        resume_from_checkpoint=args.resume_from_checkpoint,
        callbacks=validation.callbacks(),
    )
    start_trackers(accelerator, args, "nullspace-dreambooth")
    with ProjectedUpdate(optimizer, projections) if projections else nullcontext():
        pipeline.unet = loop.run()
    pipeline.unet.eval()
    if accelerator.is_main_process:
        report = {
            "arguments": {k: v for k, v in vars(args).items() if k != "hub_token"},
            "directions": direction_report,
            "statistics": [] if statistics is None else statistics.report(),
            "history": loop.history,
            "seconds": loop.seconds,
        }
        save_result(args, pipeline, statistics, report)
        if args.push_to_hub:
            publish(args, pipeline, validation.files)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return Path(args.output_dir)


if __name__ == "__main__":
    main(parse_args())
