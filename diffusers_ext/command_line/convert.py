"""`diffusers-ext convert`: LoRAs, erasers and NPNet in other formats."""

from __future__ import annotations

import argparse
from pathlib import Path

from diffusers_ext.command_line.options import Command, Outcome


def _add_lora_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="file, folder or Hub name, in either format")
    parser.add_argument("destination", help="file to write, ends in .safetensors")
    parser.add_argument("--format", choices=["diffusers", "kohya", "comfyui"], required=True)
    parser.add_argument("--pipeline", help="class of diffusers that loads it, where a transformer is involved")
    parser.add_argument("--weight_name", help="of the file in the folder or repository")


def _run_lora(args: argparse.Namespace) -> Outcome:
    from diffusers_ext.core.sources import lora_file
    from diffusers_ext.families.lora_files import check_output_path, export_lora

    check_output_path(args.destination)
    source = lora_file(args.source, args.weight_name)
    tensors = export_lora(source, args.format, args.destination, pipeline=args.pipeline)
    return _written(args.destination, format=args.format, tensors=len(tensors))


def _add_eraser_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="folder or Hub name, in either format")
    parser.add_argument("destination", help="folder to write")
    parser.add_argument("--format", choices=["peft", "legacy", "lora"], required=True)
    parser.add_argument("--scale", type=float, default=1.0, help="strength of the LoRA, for the format lora")
    parser.add_argument("--subfolder", help="folder inside the source")
    parser.add_argument("--revision", help="of the source on the Hub")
    parser.add_argument("--concept", help="what it erases, for the PEFT format")
    parser.add_argument("--anchor_concept", help="what takes its place, for the PEFT format")
    parser.add_argument("--base_model", help="Hub name of the model, for the PEFT format")


def _run_eraser(args: argparse.Namespace) -> Outcome:
    from diffusers_ext.core.result_folder import staged_output
    from diffusers_ext.eraser.files import convert_eraser
    from diffusers_ext.eraser.formats import FORMATS, check_eraser_folder

    if args.format == "lora":
        return _eraser_to_lora(args)
    config_name, _ = FORMATS[args.format]
    check_eraser_folder(Path(args.destination), args.format)
    with staged_output(args.destination, last=(config_name,)) as folder:
        shape = convert_eraser(
            args.source,
            folder,
            args.format,
            subfolder=args.subfolder,
            concept=args.concept,
            anchor_concept=args.anchor_concept,
            base_model_name_or_path=args.base_model,
            revision=args.revision,
        )
    return _written(args.destination, format=args.format, rank=shape.rank, width=shape.width, blocks=len(shape.blocks))


def _eraser_to_lora(args: argparse.Namespace) -> Outcome:
    from diffusers_ext.core.result_folder import staged_output
    from diffusers_ext.core.sources import LORA_WEIGHT_NAME
    from diffusers_ext.eraser.linear import convert_eraser_to_lora

    if Path(args.destination).is_file():
        raise ValueError(f"`destination` must be a folder, got the file {args.destination}.")
    arguments = {"scale": args.scale, "subfolder": args.subfolder, "revision": args.revision}
    with staged_output(args.destination, last=(LORA_WEIGHT_NAME,)) as folder:
        written = convert_eraser_to_lora(args.source, folder, title=args.concept, **arguments)
        files = [path.relative_to(folder).as_posix() for path in written]
    return _written(args.destination, format=args.format, files=", ".join(files))


def _add_npnet_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help=".pth or .safetensors file of the official code")
    parser.add_argument("destination", help="folder to write")


def _run_npnet(args: argparse.Namespace) -> Outcome:
    from diffusers_ext.core.result_folder import staged_output
    from diffusers_ext.golden_noise.networks.npnet import NPNet

    if Path(args.destination).is_file():
        raise ValueError(f"`destination` must be a folder, got the file {args.destination}.")
    network = NPNet.from_single_file(args.source)
    with staged_output(args.destination, last=("config.json",)) as folder:
        network.save_pretrained(folder)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return _written(args.destination, parameters=parameters, text_embed_dim=network.config.text_embed_dim)


def _written(destination: str, **facts: int | str) -> Outcome:
    told = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts.items())
    return Outcome({"destination": destination, **facts}, f"Wrote {destination} ({told}).")


CONVERSIONS = (
    Command(
        "convert lora",
        "a LoRA with the key names of diffusers or of ComfyUI and kohya",
        "Write a LoRA with other key names. Its scale is folded into the weights.",
        (
            "convert lora user/sks-dog sks_dog.safetensors --format kohya",
            "convert lora user/sks-dog sks_dog.safetensors --format comfyui --pipeline WanPipeline",
            "convert lora from_comfyui.safetensors for_diffusers.safetensors --format diffusers",
        ),
        _add_lora_arguments,
        _run_lora,
        output="destination",
    ),
    Command(
        "convert eraser",
        "an eraser in PEFT's format, in that of T2VUnlearning, or a linear one as a LoRA",
        "Write an eraser in the other format, from its files alone: adapter_config.json and "
        "adapter_model.safetensors (peft), eraser_config.json and eraser_weights.pt (legacy), or, of a linear one, "
        "LoRA files for diffusers, ComfyUI and kohya's scripts (lora).",
        (
            "convert eraser eraser_nudity no-nudity --format peft --concept nudity --base_model zai-org/CogVideoX-5b",
            "convert eraser user/no-dog legacy_no_dog --format legacy",
            "convert eraser user/no-logo no_logo_lora --format lora",
        ),
        _add_eraser_arguments,
        _run_eraser,
        output="destination",
        result_names=("adapter_config.json", "eraser_config.json", "pytorch_lora_weights.safetensors"),
    ),
    Command(
        "convert npnet",
        "a published NPNet checkpoint as a folder that loads by name",
        "Read a checkpoint of the official code, without running any of it, and write a folder for "
        "NPNet.from_pretrained.",
        ("convert npnet sdxl.pth npnet-sdxl",),
        _add_npnet_arguments,
        _run_npnet,
        output="destination",
        result_names=("config.json",),
    ),
)
