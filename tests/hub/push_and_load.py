"""What the two processes of a round trip do: one pushes everything, the other loads it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusers import StableDiffusionPipeline
from huggingface_hub import HfApi, ModelCard, hf_hub_download
from peft import AutoPeftModel, PeftModel
from peft.utils import get_peft_model_state_dict

from diffusers_ext import GoldenNoisePipeline
from tests.hub.digests import digest, module_digest, pipeline_digest, shown_pipeline
from tests.hub.shared_artifacts import (
    BASE,
    PIPELINES,
    SHARED,
    VIDEO_BASE,
    base,
    push_eraser,
    push_pipeline,
    video_base,
)
from tests.installed_versions import in_its_words
from tests.tiny_cogvideox import tiny_video_pipeline
from tests.tiny_digits import random_digits_pipeline

BRANCH, FOLDER = "next/try", "deep/er"
# With files that are not there.
MISSING = re.compile(r"^debleed_lora\(\n(?: .*\n)+\)$", re.MULTILINE)
DRAWS = re.compile(r"^((?:image|video) = pipeline\(.*)(\)\.\w+\[0\])$", re.MULTILINE)
TRANSFORMER = "tester/video-transformer"
OWNER_WORDS = ("# My own words\n\nKeep them.\n", "And these.\n")


def push_bases() -> None:
    """Plain models, as their makers push them."""
    random_digits_pipeline().push_to_hub(BASE)
    card = ModelCard.load(hf_hub_download(BASE, "README.md"))
    card.data.license = "openrail"
    HfApi().upload_file(path_or_fileobj=str(card).encode(), path_in_repo="README.md", repo_id=BASE)
    tiny_video_pipeline().push_to_hub(VIDEO_BASE)
    video_base().push_to_hub(TRANSFORMER)


def push_all() -> dict[str, dict[str, str]]:
    """Push all; returns the digests before and the hashes of the commits to load by."""
    push_bases()
    pushed = {}
    for name, shared in SHARED.items():
        first, second = shared.make(0), shared.make(1)
        repo_id, kind = f"tester/{name}", "dataset" if name == "pairs" else "model"
        shared.push(first, repo_id, private=True)
        shared.push(first, repo_id, revision=BRANCH)
        edit_card(repo_id, kind)
        shared.push(second, repo_id, revision=BRANCH)
        shared.push(second, repo_id, create_pr=True)
        if shared.subfolders:
            # In a repository of its own: a second LoRA file would leave stock diffusers a choice.
            shared.push(second, f"{repo_id}-below", subfolder=FOLDER)
        commit = HfApi().repo_info(repo_id, revision=BRANCH, repo_type=kind).sha
        pushed[name] = {
            "first": shared.digest(first), "second": shared.digest(second), "commit": commit
        }  # fmt: skip
    for name, (_, make) in PIPELINES.items():
        pipeline = make()
        push_pipeline(pipeline, f"tester/{name}")
        pushed[name] = {"first": pipeline_digest(pipeline)}
    push_eraser(SHARED["eraser"].make(0), "tester/eraser-of-transformer", TRANSFORMER)
    return pushed


def edit_card(repo_id: str, repo_type: str) -> None:
    """As an owner does in the browser: on the branch, in the header and around our part."""
    place = {"repo_id": repo_id, "repo_type": repo_type, "revision": BRANCH}
    card = ModelCard.load(hf_hub_download(filename="README.md", **place))
    card.data.license, card.data.language = "cc0-1.0", "en"
    card.data.tags = [*card.data.tags, "mine"]
    card.text = f"\n{OWNER_WORDS[0]}\n{card.text}\n{OWNER_WORDS[1]}"
    HfApi().upload_file(path_or_fileobj=str(card).encode(), path_in_repo="README.md", **place)


def load_all(commits: dict[str, str], go_offline: Callable[[], None]) -> dict[str, Any]:
    """Load all in every way, at last without network; digests by way and name."""
    base(), video_base()
    ways = {
        "main": {},
        "branch": {"revision": BRANCH},
        "commit": {},
        "pull request": {"revision": "refs/pr/1"},
        "subfolder": {"subfolder": FOLDER},
    }
    refused = {name: _refusal(name) for name in SHARED}
    found = {"no token": refused, "others": _load_others(), "cards": _run_cards()}
    for offline in (False, True):
        if offline:
            go_offline()
        for way, where in ways.items():
            found[f"{way} offline" if offline else way] = {
                name: _load(name, way, where, commits, offline) for name in SHARED
            }
    return found


def _load(name: str, way: str, where: dict[str, str], commits: dict[str, str], offline: bool) -> str | None:
    shared = SHARED[name]
    if way == "subfolder" and not shared.subfolders:
        return None
    repo_id = f"tester/{name}-below" if way == "subfolder" else f"tester/{name}"
    if way == "commit":
        where = {"revision": commits[name]}
    arguments = {**where, **({"local_files_only": True} if offline else {})}
    return shared.digest(shared.load(repo_id, **arguments))


def _refusal(name: str) -> str:
    """What somebody who is not logged in reads about a private repository."""
    try:
        SHARED[name].load(f"tester/{name}", token=False)
    except (OSError, ValueError) as error:
        # diffusers' pipelines tell only as the cause that the Hub knows no such repository.
        return f"{type(error).__name__}: {error} {error.__cause__}"
    return ""


def _load_others() -> dict[str, Any]:
    found = {
        name: [type(loaded := cls.from_pretrained(f"tester/{name}")).__name__,
               pipeline_digest(loaded)]
        for name, (cls, _) in PIPELINES.items()
    }  # fmt: skip
    plain = StableDiffusionPipeline.from_pretrained("tester/golden")
    found["plain of golden"] = [type(plain).__name__, pipeline_digest(plain)]
    found["plain"] = pipeline_digest(base())
    mixed = GoldenNoisePipeline.from_pretrained(BASE)
    mixed.load_noise_model("tester/golden", subfolder="noise_model")
    found["network of a pipeline"] = shown_pipeline(mixed)
    mixed.load_noise_model("tester/npnet", revision=BRANCH)
    found["network of a branch"] = module_digest(mixed.noise_model)
    model = PeftModel.from_pretrained(video_base(), "tester/eraser")
    found["PeftModel"] = digest(get_peft_model_state_dict(model))
    model.unload()
    auto = AutoPeftModel.from_pretrained("tester/eraser-of-transformer")
    found["AutoPeftModel"] = digest(get_peft_model_state_dict(auto))
    return found


def _run_cards() -> dict[str, int]:
    """Run the Python blocks of cards, on the CPU and in two steps; gives their numbers."""
    found = {}
    for name, shared in SHARED.items():
        repo_id = f"tester/{name}-below" if shared.subfolders else f"tester/{name}"
        kind = "dataset" if name == "pairs" else "model"
        text = Path(hf_hub_download(repo_id, "README.md", repo_type=kind)).read_text()
        blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        for block in blocks:
            block = in_its_words(re.sub(MISSING, "", block).replace('"cuda"', '"cpu"'))
            exec(re.sub(DRAWS, r"\1, num_inference_steps=2\2", block), {})
        found[name] = len(blocks)
    return found
