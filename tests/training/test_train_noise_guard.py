from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from diffusers_ext.golden_noise import text_cache
from diffusers_ext.golden_noise.networks.base import load_noise_model
from diffusers_ext.golden_noise.pairs.dataset import source_noise
from diffusers_ext.golden_noise.pairs.shards import PairRecord, PairWriter, judged_pairs, shard_files
from diffusers_ext.training.golden_noise import gains
from diffusers_ext.training.guard import GuardValidation
from tests.training import noise_sets
from tests.training.noise_sets import SHAPE, guarded_network
from tests.training.pair_runs import QUICK_PAIRS, write_prompt_file
from tests.training.script_runs import PROMPTS, command_line
from training import train_noise_guard

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> Path:
    return guarded_network(tmp_path_factory.mktemp("network"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return noise_sets.judged_pairs(tmp_path_factory.mktemp("pairs") / "judged", 200, PROMPTS)


def line(network: Path, pairs: Path, output_dir: Path, **arguments) -> list[str]:
    usual = {"noise_model": network, "dataset_dir": pairs, "output_dir": output_dir, "bands": 4, "width": 16,
             "num_layers": 1, "num_heads": 2, "max_train_steps": 60, "learning_rate": 5e-3,
             "lr_scheduler": "constant", "reads": "noise"}  # fmt: skip
    return command_line(**{**usual, **arguments})


def run(*words, **arguments) -> Path:
    return train_noise_guard.main(train_noise_guard.parse_args(line(*words, **arguments)))


@pytest.mark.parametrize("expects", ["rank", "gain"])
def test_rejected_pairs_teach_it_which_noises_to_leave(network, pairs, tmp_path, expects):
    folder = run(network, pairs, tmp_path / "out", gain_lost=0.1, validation_steps=30, expects=expects)
    report = json.loads((folder / "training_report.json").read_text())
    assert (report["pairs"], report["training_pairs"], report["validation_pairs"]) == (200, 160, 40)
    assert [entry["step"] for entry in report["validation"]] == [30, 60]
    figures = report["validation"][-1]
    assert figures["correlation"] > 0.7
    assert figures["gain_kept"] >= 0.9
    assert figures["losses_left"] < figures["losses"] / 2
    assert figures["win_rate_changed"] > figures["win_rate"]
    guarded, bare = load_noise_model(folder), load_noise_model(network)
    assert guarded.guard.config.threshold == pytest.approx(figures["threshold"])
    noise = torch.stack([source_noise(seed, SHAPE) for seed in range(1000, 1040)])
    text = torch.randn(1, 16, 128, generator=torch.Generator().manual_seed(1)).expand(40, -1, -1)
    unchanged = (guarded.refine(noise, text) == noise).flatten(1).all(1)
    assert 0 < unchanged.sum() < 40
    assert torch.equal(guarded.refine(noise, text)[~unchanged], bare.refine(noise, text)[~unchanged])


class Stopped(Exception):
    """Stands for the end of the process."""


def test_a_stopped_run_goes_on_to_the_same_guard_with_the_text_that_it_left(network, pairs, tmp_path, monkeypatch):
    def stop(*_):
        raise Stopped

    usual = {"max_train_steps": 4, "validation_steps": 3}
    whole = run(network, pairs, tmp_path / "whole", **usual)
    with monkeypatch.context() as patch:
        patch.setattr(GuardValidation, "run", stop)
        with pytest.raises(Stopped):
            run(network, pairs, tmp_path / "parts", **usual, checkpointing_steps=2)
    kept = tmp_path / "parts" / ".text_cache"
    assert [path.name for path in kept.glob("*/*")] == ["00000.safetensors"]
    monkeypatch.setattr(text_cache, "encode_prompts", lambda *_: pytest.fail("encoded again"))
    parts = run(network, pairs, tmp_path / "parts", **usual, checkpointing_steps=2, resume_from_checkpoint="latest")
    assert not kept.exists()
    guards = [load_noise_model(folder).guard for folder in (whole, parts)]
    assert guards[0].config.threshold == guards[1].config.threshold
    for name, value in guards[0].state_dict().items():
        assert torch.equal(value, guards[1].state_dict()[name]), name


def test_pairs_without_rewards_are_refused(network, tmp_path):
    writer = PairWriter(tmp_path / "pairs", SHAPE, 1, num_shards=1, facts={})
    writer.create()
    record = PairRecord(0, PROMPTS[0], 0, None, None, 0.0, 1.0, 0.0, 0.0)
    writer.write_part(0, 0, torch.zeros(1, 1, *SHAPE), [record])
    writer.finish_shard(0, 1)
    with pytest.raises(ValueError, match="`dataset_dir` must hold pairs with rewards, got none"):
        run(network, tmp_path / "pairs", tmp_path / "out")


def judged(network, tmp_path, dataset_dir="gains", output_dir="out", **changes) -> Path:
    prompts = write_prompt_file(tmp_path / "prompts.txt")
    arguments = {"prompt_file": prompts, "noises_per_prompt": 2, **QUICK_PAIRS, "reads": "prediction",
                 "max_train_steps": 2, **changes}  # fmt: skip
    return run(network, tmp_path / dataset_dir, tmp_path / output_dir, **arguments)


def test_the_network_itself_is_judged_where_there_are_prompts(network, tmp_path, monkeypatch):
    folder, drawn = judged(network, tmp_path), []
    found = load_noise_model(folder).guard.config
    assert (found.reads, found.target, found.prediction_steps) == ("prediction", "rank", 2)
    records = judged_pairs(tmp_path / "gains")
    assert [record.index for record in records] == list(range(10))
    assert all(record.reward_golden != record.reward_source for record in records)

    def render(pipeline, noise, *others):
        drawn.append(len(noise))
        return plainly(pipeline, noise, *others)

    plainly = gains.render
    monkeypatch.setattr(gains, "render", render)
    shard_files(tmp_path / "gains", 1).summary.unlink()  # a run that was stopped in the second shard
    again = judged(network, tmp_path, output_dir="again")
    assert drawn == [8]  # two pictures each of the four candidates in it
    assert judged_pairs(tmp_path / "gains") == records
    guards = [load_noise_model(where).guard for where in (folder, again)]
    for name, value in guards[0].state_dict().items():
        assert torch.equal(value, guards[1].state_dict()[name]), name
    judged(network, tmp_path, output_dir="third", prompt_file=None)
    assert drawn == [8]
    with pytest.raises(ValueError, match="`num_inference_steps` must be the same to continue"):
        judged(network, tmp_path, output_dir="fourth", num_inference_steps=1)


def test_gains_of_another_network_are_refused(network, tmp_path):
    judged(network, tmp_path)
    other = load_noise_model(network)
    torch.nn.init.normal_(other.head.weight, std=0.1)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="`dataset_dir` must hold gains of `noise_model`, got those of another"):
        judged(tmp_path / "other", tmp_path, output_dir="again", prompt_file=None)
