"""Runs of the script that makes noise pairs, short and with a reward that needs no model."""

from __future__ import annotations

from pathlib import Path

BRIGHTNESS = "tests.training.stub_rewards:Brightness"
PROMPTS = ("a red seven", "NA", "a green two", "a blue three", "the number nine in white")
# Shards of 6 candidates in batches of 4 and 2.
QUICK_PAIRS = {"num_inference_steps": 2, "guidance_scale": 1.5, "reward": BRIGHTNESS, "shard_size": 6, "batch_size": 4}


def write_prompt_file(path: Path, prompts: tuple[str, ...] = PROMPTS) -> Path:
    """One prompt a line."""
    path.write_text("\n".join([*prompts, ""]))
    return path


def set_content(folder: Path) -> dict[str, bytes]:
    """All of a set but what tells times: the report, and the record of checksums."""
    kept = {"report.json", ".verified.json"}  # tell times
    files = [p for p in folder.rglob("*") if p.is_file() and p.name not in kept]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}
