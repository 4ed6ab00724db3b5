"""What a stopped training of a network leaves for its resume beside checkpoints: the text, and what was hashed."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffusers_ext.golden_noise import text_cache
from diffusers_ext.golden_noise.pairs import shards as pair_shards
from diffusers_ext.golden_noise.pairs import verified
from diffusers_ext.training.golden_noise.result import NoiseValidation
from diffusers_ext.training.noise import PAIRS, open_data
from tests.training.noise_runs import noise_line, script_of, train
from tests.training.noise_sets import write_noises

pytestmark = pytest.mark.usefixtures("fresh_accelerator")
MODEL = "golden_noise_model"
USUAL = {"checkpointing_steps": 2, "validation_steps": 3}


class Stopped(Exception):
    """Stands for the end of the process."""


@pytest.fixture(scope="module")
def noises(tmp_path_factory) -> Path:
    return write_noises(tmp_path_factory.mktemp("noises") / "set", facts={})


def stop(*_) -> None:
    raise Stopped


@pytest.mark.parametrize("own", [False, True], ids=["of the run", "of the user"])
def test_a_resume_reads_the_text_of_the_stopped_run(noises, tmp_path, monkeypatch, own):
    out = tmp_path / "out"
    kept = tmp_path / "text" if own else out / ".text_cache"
    usual = {**USUAL, "text_cache_dir": kept if own else None}
    with monkeypatch.context() as patch:
        patch.setattr(NoiseValidation, "run", stop)
        with pytest.raises(Stopped):
            train(MODEL, noises, out, **usual)
    assert [path.name for path in kept.glob("*/*")] == ["00000.safetensors"]
    monkeypatch.setattr(text_cache, "encode_prompts", lambda *_: pytest.fail("encoded again"))
    train(MODEL, noises, out, **usual, resume_from_checkpoint="latest")
    assert kept.exists() == own
    assert (out / "config.json").is_file()


def test_without_checkpoints_one_process_keeps_text_in_memory(noises, tmp_path, monkeypatch):
    monkeypatch.setattr(text_cache.StoredText, "open", lambda _: pytest.fail("a file"))
    train(MODEL, noises, tmp_path / "out")


def test_processes_but_the_first_hash_nothing(tmp_path, monkeypatch):
    noises = write_noises(tmp_path / "set", facts={})
    hashed: list[Path] = []
    digest = pair_shards.file_sha256
    monkeypatch.setattr(pair_shards, "file_sha256", lambda path: (hashed.append(path), digest(path))[1])
    monkeypatch.setattr(verified, "_SETTLED_NS", -(10**18))  # as if the set were old
    settings = script_of(MODEL).parse_args(noise_line(MODEL, noises, tmp_path / "out"))
    open_data(settings, PAIRS, False)
    assert not hashed
    first = open_data(settings, PAIRS)
    assert len(hashed) == 3
    again = open_data(settings, PAIRS)
    assert len(hashed) == 3
    assert again.facts == first.facts
