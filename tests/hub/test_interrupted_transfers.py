"""Transfers that break off: nothing half done is ever visible, and the next call goes on."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError

from diffusers_ext import Artifact, GoldenNoiseModel, PairDataset, load_eraser, open_pairs
from tests.eraser.saved_erasers import run, saved_eraser
from tests.golden_noise.pair_sets import write_set
from tests.hub.digests import digest
from tests.hub_errors import CONNECTION_LOST, LOST, TRUNCATED_IS_TRIED_AGAIN
from tests.hub_server import HubServer
from tests.hub_storage import Repository
from tests.tiny_cogvideox import tiny_transformer

REPO = "tester/interrupted"
FACTS = {
    "base_model": "tester/base", "trained_on": "Random numbers.", "license": "mit",
    "pipeline": "StableDiffusionPipeline", "reward": "",
}  # fmt: skip


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    """The client waits a second and longer before it tries again."""
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))


class Numbers(Artifact):
    """An artifact of one tensor."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values

    def _to_artifact(self):
        return {}, {"values": self.values}

    @classmethod
    def _from_artifact(cls, config, tensors):
        return cls(tensors["values"])


def make_network(folder: Path) -> None:
    sizes = {"in_channels": 4, "sample_size": 8, "text_embed_dim": 8}
    torch.manual_seed(0)
    GoldenNoiseModel(**sizes, width=32, num_layers=1, num_heads=2).save_pretrained(folder)


def network_digest(source: str | Path, **arguments: Any) -> str:
    return digest(GoldenNoiseModel.from_pretrained(source, **arguments).state_dict())


def eraser_digest(source: str | Path, **arguments: Any) -> str:
    transformer = tiny_transformer()
    names = [name for name, _ in transformer.named_parameters()]
    try:
        load_eraser(transformer, source, **arguments)
    except HfHubHTTPError:
        assert [name for name, _ in transformer.named_parameters()] == names
        raise
    return digest({"output": run(transformer)})


def pairs_digest(source: str | Path, **arguments: Any) -> str:
    pairs = open_pairs(source, **arguments)
    return digest({str(index): pairs[index]["golden"] for index in range(len(pairs))})


KINDS: dict[str, tuple[str, Callable[[Path], Any], Callable[..., str]]] = {
    "artifact": (
        "model",
        lambda folder: Numbers(torch.randn(400)).save_pretrained(folder),
        lambda *source, **arguments: digest(vars(Numbers.from_pretrained(*source, **arguments))),
    ),
    "network": ("model", make_network, network_digest),
    "eraser": ("model", saved_eraser, eraser_digest),
    "pairs": ("dataset", write_set, pairs_digest),
}


def offer(hub: HubServer, kind: str, folder: Path) -> tuple[str, Callable[..., str]]:
    """Put one of a kind on the Hub; returns its digest, and what loads it."""
    repo_type, make, load = KINDS[kind]
    make(folder)
    prefix = "" if repo_type == "model" else "datasets/"
    hub.repos[prefix + REPO] = Repository(REPO, f"{repo_type}s", private=False)
    hub.repos[prefix + REPO].put(folder)
    return load(folder), load


def cached_weights(cache: Path) -> list[str]:
    return [path.name for path in cache.rglob("snapshots/*/**/*.safetensors")]


@pytest.mark.parametrize("kind", KINDS)
def test_a_refused_download_leaves_nothing_half_loaded(hub, tmp_path, kind):
    expected, load = offer(hub, kind, tmp_path / "folder")
    cache = tmp_path / "cache"
    hub.fail_next("GET", r"\.safetensors$", how="403")
    with pytest.raises(OSError, match="403"):  # as which diffusers passes the client's error on
        load(REPO, cache_dir=cache)
    left = len(cached_weights(cache))
    assert left == (1 if kind == "pairs" else 0)  # of two shards one has arrived
    assert load(REPO, cache_dir=cache) == expected
    assert load(REPO, cache_dir=cache, local_files_only=True) == expected
    gets = hub.sent("GET", r"/resolve/.*\.safetensors$")
    assert [request.status for request in gets].count(200) == len(cached_weights(cache))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["truncate", "drop"])
def test_a_broken_download_is_tried_again(hub, tmp_path, kind, how):
    expected, load = offer(hub, kind, tmp_path / "folder")
    hub.fail_next("GET", r"\.safetensors$", how=how)
    if not TRUNCATED_IS_TRIED_AGAIN and how == "truncate":
        with pytest.raises(OSError, match="IncompleteRead"):
            load(REPO, cache_dir=tmp_path / "cache")
        # Of two shards, which come at once, the other may have arrived.
        assert len(cached_weights(tmp_path / "cache")) <= (1 if kind == "pairs" else 0)
    assert load(REPO, cache_dir=tmp_path / "cache") == expected
    assert hub.sent("GET", r"\.safetensors$")[0].status == 0


def test_a_download_that_breaks_again_and_again_is_an_error(hub, tmp_path):
    expected, load = offer(hub, "network", tmp_path / "folder")
    hub.fail_next("GET", r"\.safetensors$", times=6, how="drop")
    with pytest.raises((CONNECTION_LOST, OSError), match=LOST):
        load(REPO, cache_dir=tmp_path / "cache")
    assert cached_weights(tmp_path / "cache") == []
    assert load(REPO, cache_dir=tmp_path / "cache") == expected


@pytest.fixture
def pairs(hub, tmp_path) -> PairDataset:
    """A set of two shards, which is on the Hub in an older state."""
    write_set(tmp_path / "old", finish=(0,))
    open_pairs(tmp_path / "old").push_to_hub(REPO, allow_unfinished=True, **FACTS)
    write_set(tmp_path / "new")
    hub.requests.clear()
    return open_pairs(tmp_path / "new")


@pytest.mark.parametrize(
    ("method", "path", "how", "error"),
    [
        ("PUT", "lfs-objects", "403", RuntimeError),
        ("POST", "/preupload/", "403", HfHubHTTPError),
        ("POST", "/commit/", "drop", CONNECTION_LOST),
        ("POST", "/commit/", "503", HfHubHTTPError),
    ],
)
def test_an_interrupted_upload_is_invisible_and_goes_on(hub, pairs, method, path, how, error):
    before, commits = hub.files(REPO, "dataset"), len(hub.repos[f"datasets/{REPO}"].commits)
    hub.fail_next(method, path, how=how)
    with pytest.raises(error):
        pairs.push_to_hub(REPO, **FACTS)
    assert hub.files(REPO, "dataset") == before
    assert len(hub.repos[f"datasets/{REPO}"].commits) == commits
    assert len(open_pairs(REPO)) == 4
    pairs.push_to_hub(REPO, **FACTS)
    assert pairs_digest(REPO) == pairs_digest(pairs.folder)
    arrived = [request.path for request in hub.sent("PUT", "lfs-objects") if request.status == 200]
    assert len(arrived) == len(set(arrived)) == 3  # another table of rejected, and the second shard


def test_a_dropped_upload_is_tried_again(hub, pairs):
    hub.fail_next("PUT", "lfs-objects", how="drop")
    pairs.push_to_hub(REPO, **FACTS)
    assert pairs_digest(REPO) == pairs_digest(pairs.folder)
    assert [request.status for request in hub.sent("PUT", "lfs-objects")].count(0) == 1


def test_a_commit_whose_answer_is_lost_is_not_made_twice(hub, pairs):
    hub.fail_next("POST", "/commit/", how="lost")
    with pytest.raises(CONNECTION_LOST, match=LOST):
        pairs.push_to_hub(REPO, **FACTS)
    commits = len(hub.repos[f"datasets/{REPO}"].commits)
    address = pairs.push_to_hub(REPO, **FACTS)
    assert len(hub.repos[f"datasets/{REPO}"].commits) == commits
    assert hub.repos[f"datasets/{REPO}"].at("main").sha in address
