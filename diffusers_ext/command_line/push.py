"""`diffusers-ext push`: share what is in a folder, with its model card."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from diffusers_ext.command_line.options import Command, Outcome

_CARD_FACTS = {
    "base_model": "Hub name of the base model, where the files do not tell",
    "license": "a name of the Hub, e.g. apache-2.0; the base model's own without it",
    "license_name": "of a licence that is `other` on the Hub",
    "license_link": "its address",
    "trained_on": "what it was trained on or made from, in words",
    "instance_prompt": "of a LoRA or subject: asks for it",
    "results": "report of an evaluation: its folder or report.json",
}
_LICENCE = ("license", "license_name", "license_link")
_HUB = ("private", "revision", "create_pr", "commit_message", "subfolder")


def _add_push_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="folder, or the file of a LoRA")
    parser.add_argument("repo_id", help="user/name, made when absent")
    group = parser.add_argument_group("model card")
    for name, explanation in _CARD_FACTS.items():
        group.add_argument(f"--{name}", help=explanation)
    group.add_argument(
        "--fact",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any other fact of the card, as JSON or as text; may be repeated",
    )
    group = parser.add_argument_group("hub")
    group.add_argument("--private", action="store_true", default=None, help="if the repository is new")
    group.add_argument("--revision", help="branch, made when absent")
    group.add_argument("--create_pr", action="store_true", help="propose it as a pull request")
    group.add_argument("--commit_message")
    group.add_argument("--subfolder", help="where in the repository the files go")
    group.add_argument("--hub_token", help="taken from the login without it")


def _run_push(args: argparse.Namespace) -> Outcome:
    from diffusers_ext.hub.kinds import named_licence
    from diffusers_ext.sharing import push_artifact

    if not Path(args.source).exists():
        raise FileNotFoundError(f"`source` must be a folder or a file, got {args.source}: there is none.")
    given = {name: getattr(args, name) for name in _CARD_FACTS if getattr(args, name) is not None}
    hub = {name: getattr(args, name) for name in _HUB}
    facts = read_facts(args.fact)
    twice = sorted(facts.keys() & {*_CARD_FACTS, *hub, "token"})
    if twice:
        raise ValueError(f"`fact` must not name what has a flag of its own, got {twice}.")
    names = [given.pop(name, None) for name in _LICENCE]
    if any(names):
        given["license"] = named_licence(*names)
    url = push_artifact(args.source, args.repo_id, token=args.hub_token, **hub, **given, **facts)
    return Outcome({"repo_id": args.repo_id, "url": url}, f"Pushed: {url}")


def read_facts(entries: list[str]) -> dict[str, Any]:
    """`{name: value}` of `NAME=VALUE`, each name once, the value as JSON if it is any, else as text."""
    facts: dict[str, Any] = {}
    for entry in entries:
        name, equals, text = entry.partition("=")
        if not equals or not name.isidentifier() or name in facts:
            raise ValueError(f"`fact` must be NAME=VALUE, each name once, got {entry!r}.")
        try:
            facts[name] = json.loads(text)
        except json.JSONDecodeError:
            facts[name] = text
    return facts


PUSH = Command(
    "push",
    "share what is in a folder or file on the Hub, with its card",
    "Recognise what a folder holds (statistics, a LoRA, a golden-noise network, an eraser, noise pairs, a "
    "pipeline), write its card and upload both in one commit.",
    (
        "push statistics user/sd-1.5-statistics --private",
        "push my_lora.safetensors user/sks-dog --base_model stable-diffusion-v1-5/stable-diffusion-v1-5 "
        '--instance_prompt "a photo of sks dog" --trained_on "six photographs of my dog" '
        "--fact directions=generalized --fact pipeline=StableDiffusionPipeline",
    ),
    _add_push_arguments,
    _run_push,
)
