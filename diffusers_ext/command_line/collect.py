"""`diffusers-ext collect`: measure what a model knows, for training in its null space."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers_ext.command_line.options import (
    Command,
    Outcome,
    add_base_model_arguments,
    add_hub_arguments,
    check_drawing_arguments,
    check_hub_arguments,
    check_values,
    hub_arguments,
    load_base_pipeline,
)

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from diffusers_ext.nullspace.statistics import FeatureStatistics


def _add_collect_arguments(parser: argparse.ArgumentParser) -> None:
    add_base_model_arguments(parser)
    parser.add_argument("--output_dir", required=True, help="folder of the statistics")
    group = parser.add_argument_group("knowledge")
    group.add_argument("--knowledge_prompts", required=True, help="text file, one prompt a line, # comments")
    group.add_argument(
        "--other_instance_prompts",
        action="append",
        default=[],
        help="of another subject, weighs as much as all knowledge; may be repeated",
    )
    group.add_argument("--features", nargs="+", default=["k", "v"], help="q k v out attn1.q ... ff.in ff.out")
    group.add_argument("--cross_attention_layers", nargs="+", default=["all"], help="or indices")
    group.add_argument("--no_sub_phrases", action="store_true", help="only the prompts themselves")
    group.add_argument("--negative_prompt", default="")
    group.add_argument("--num_inference_steps", type=int, default=50)
    group.add_argument("--guidance_scale", type=float, help="7.5, or a flow-matching pipeline's own, without it")
    group.add_argument("--height", type=int, help="the model's own without it")
    group.add_argument("--width", type=int, help="the model's own without it")
    group.add_argument("--statistics_batch_size", type=int, default=4)
    group.add_argument(
        "--token_share", type=float, default=1.0, help="of the tokens of denoising runs, read at random; 1 reads all"
    )
    group.add_argument(
        "--gram_precision",
        choices=["float32", "bf16x3"],
        default="float32",
        help="of Gram matrices along denoising runs; bf16x3 takes tensor cores",
    )
    group.add_argument("--progress_dir", help="folder for running totals: the same call goes on after a stop")
    group.add_argument(
        "--shard",
        help="INDEX/COUNT, 0/4 to 3/4 for four jobs: this job's part of the statistics, to be put together by `merge`",
    )
    _add_form_arguments(group)
    add_hub_arguments(parser, "statistics")


def _add_form_arguments(group: argparse._ArgumentGroup) -> None:
    """In which forms statistics are written."""
    group.add_argument("--compress", type=float, help="keep this share of the energy, e.g. 0.999")
    group.add_argument(
        "--store_spectra", action="store_true", help="also eigendecompositions, for whoever loads them; twice the size"
    )
    group.add_argument("--export_layout", help="folder: also as a tree of npy files")


def _run_collect(args: argparse.Namespace) -> Outcome:
    from diffusers_ext.nullspace.prompts import read_prompts_file
    from diffusers_ext.nullspace.settings import read_layers

    counts = ("num_inference_steps", "statistics_batch_size", "height", "width")
    check_drawing_arguments(args, counts)
    check_values(args, ["compress"], "a share of the energy in (0, 1]", lambda v: 0 < v <= 1)
    shard = _read_shard(args)
    layers = read_layers(args.cross_attention_layers)
    prompts = read_prompts_file(args.knowledge_prompts)
    check_hub_arguments(args)
    pipeline = load_base_pipeline(args)
    began = time.perf_counter()
    statistics = _collect(args, pipeline, prompts, layers, shard)
    seconds = time.perf_counter() - began
    if args.shard is not None:
        return _write_part(args, statistics, shard, seconds)
    outcome = _write(args, statistics, seconds)
    if not args.push_to_hub:
        return outcome
    url = statistics.push_to_hub(**hub_arguments(args))
    return Outcome({**outcome.facts, "url": url}, f"{outcome.text}\nPushed: {url}")


def _read_shard(args: argparse.Namespace) -> tuple[int, int]:
    """`--shard`, of which all is one part; `ValueError` for a form that only the whole has."""
    from diffusers_ext.nullspace.parts import read_shard

    if args.shard is None:
        return 0, 1
    for name in ("compress", "store_spectra", "export_layout", "push_to_hub"):
        if getattr(args, name):
            raise ValueError(
                f"`{name}` must be left out with `shard`, got {getattr(args, name)}: it is of the whole, which "
                "`diffusers-ext merge` writes."
            )
    return read_shard(args.shard)


def _write_part(
    args: argparse.Namespace, statistics: FeatureStatistics, shard: tuple[int, int], seconds: float
) -> Outcome:
    from diffusers_ext.core.result_folder import staged_output
    from diffusers_ext.nullspace.parts import FeatureStatisticsPart

    with staged_output(args.output_dir, last=("config.json",)) as folder:
        FeatureStatisticsPart.of(statistics, shard).save_pretrained(folder)
    vectors = {key: moment.count for key, moment in statistics.moments.items()}
    facts = {"output_dir": args.output_dir, "part": list(shard), "vectors": vectors, "seconds": seconds}
    words = (
        f"Wrote part {shard[0]}/{shard[1]} to {args.output_dir} after {seconds:.1f} s. With all parts: diffusers-ext "
        "merge PART ... --output_dir STATISTICS"
    )
    return Outcome(facts, words)


def _write(args: argparse.Namespace, statistics: FeatureStatistics, seconds: float) -> Outcome:
    """Write whole statistics in the forms that are asked for."""
    from diffusers_ext.core.result_folder import staged_output

    if args.export_layout is not None:
        statistics.export_layout(args.export_layout, show_progress=not args.quiet)
    if args.compress is not None:
        statistics = statistics.compress(args.compress)
    if args.store_spectra:
        statistics.store_spectra()
    with staged_output(args.output_dir, last=("config.json",)) as folder:
        statistics.save_pretrained(folder)
    rows = statistics.report()
    facts: dict[str, Any] = {
        "output_dir": args.output_dir,
        "prompts": len(statistics.facts["prompts"]),
        "linears": len(statistics.linears),
        "matrices": rows,
        "seconds": seconds,
    }
    lines = [
        f"{row['matrix']}: {row['linears']} Linears, {row['vectors']} vectors of width {row['dim']}, "
        f"99.9 % of the energy in {row['dims_99.9']} directions"
        for row in rows
    ]
    lines.append(f"Wrote {args.output_dir} after {seconds:.1f} s.")
    return Outcome(facts, "\n".join(lines))


def _collect(
    args: argparse.Namespace,
    pipeline: DiffusionPipeline,
    prompts: list[str],
    layers: str | list[int],
    shard: tuple[int, int],
) -> FeatureStatistics:
    """This shard's statistics of the knowledge and of other subjects, each of which weighs as much as all of it."""
    from diffusers_ext.nullspace.collect import collect_statistics

    names = (
        "features",
        "negative_prompt",
        "num_inference_steps",
        "guidance_scale",
        "height",
        "width",
        "seed",
        "token_share",
        "gram_precision",
    )
    options: dict[str, Any] = {name: getattr(args, name) for name in names}
    options |= {"layers": layers, "expand_sub_phrases": not args.no_sub_phrases}
    options |= {"batch_size": args.statistics_batch_size, "show_progress": not args.quiet, "shard": shard}
    statistics = collect_statistics(pipeline, prompts, progress_dir=args.progress_dir, **options)
    if args.other_instance_prompts:
        folder = args.progress_dir and Path(args.progress_dir, "other_subjects")
        options["expand_sub_phrases"] = False
        others = collect_statistics(pipeline, args.other_instance_prompts, progress_dir=folder, **options)
        statistics.merge(others, times=len(prompts))
    return statistics


COLLECT = Command(
    "collect",
    "measure what a model knows, for training in its null space",
    "Collect the feature statistics of a set of prompts. K and V of cross-attention, the default, need "
    "the text encoder alone; other features are read along denoising runs.",
    (
        "collect --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 "
        "--knowledge_prompts knowledge.txt --output_dir statistics",
        "collect --pretrained_model_name_or_path examples/digits/model --features q k v out "
        "--num_inference_steps 12 --knowledge_prompts knowledge.txt --output_dir statistics --json",
    ),
    _add_collect_arguments,
    _run_collect,
    output="output_dir",
    result_names=("config.json",),
)


def _add_merge_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("parts", nargs="+", metavar="PART", help="folders of all parts, in any order")
    parser.add_argument("--output_dir", required=True, help="folder of the statistics")
    _add_form_arguments(parser.add_argument_group("forms"))


def _run_merge(args: argparse.Namespace) -> Outcome:
    from diffusers_ext.nullspace.parts import merge_parts

    check_values(args, ["compress"], "a share of the energy in (0, 1]", lambda v: 0 < v <= 1)
    check_values(args, ["output_dir"], "a folder", lambda value: not Path(value).is_file())
    began = time.perf_counter()
    statistics = merge_parts(args.parts)
    return _write(args, statistics, time.perf_counter() - began)


MERGE = Command(
    "merge",
    "put statistics together that several jobs have collected in parts",
    "Add up the parts that `collect --shard` has written, in any order and on any machine. The result is that of one "
    "process. Parts that are missing, there twice, or of another model, other prompts or settings are refused.",
    ("merge parts/0 parts/1 parts/2 parts/3 --output_dir statistics",),
    _add_merge_arguments,
    _run_merge,
    output="output_dir",
    result_names=("config.json",),
)
