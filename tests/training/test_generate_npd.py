from __future__ import annotations

import json

import pytest
import torch
from datasets import load_dataset

from diffusers_ext.golden_noise.noise_statistics import noise_statistics
from diffusers_ext.golden_noise.pairs.dataset import open_pairs
from diffusers_ext.golden_noise.pairs.shards import read_table
from diffusers_ext.training import pairs as generate_npd
from diffusers_ext.training.golden_noise import candidates
from diffusers_ext.training.golden_noise.settings import SDXL
from examples.digits.check_model import MODEL_DIR
from tests.training.pair_runs import BRIGHTNESS, write_prompt_file
from tests.training.script_runs import files_below


def test_a_set_of_pairs(generate, tmp_path):
    folder = generate(noises_per_prompt=3)
    pairs = open_pairs(folder)
    rejected = [r for path in sorted(folder.glob("rejected/*")) for r in read_table(path)]
    everything = sorted([*pairs.records, *rejected])
    assert [record.index for record in everything] == list(range(15))
    assert [record.prompt for record in everything[:6]] == ["a red seven"] * 3 + ["NA"] * 3
    assert len({record.seed for record in everything}) == 15
    assert (pairs.num_steps, pairs.latent_shape, pairs.complete) == (1, (4, 8, 8), True)
    assert 0 < len(pairs) < 15
    for record in everything:
        assert (record.reward_golden > record.reward_source) == (record in pairs.records)
    std = noise_statistics(pairs[0]["golden"]).std.item()
    assert pairs.records[0].std == pytest.approx(std, abs=1e-5)
    table = load_dataset(str(folder), "pairs", split="train", cache_dir=str(tmp_path / "cache"))
    assert table["prompt"] == pairs.prompts
    names = {f"{part}/{shard:05d}.{ending}" for shard in range(3) for part, ending in (
        ("deltas", "safetensors"), ("pairs", "parquet"), ("rejected", "parquet"), ("shards", "json")
    )}  # fmt: skip
    # Checksums are noted down of files that are old enough: where the machine is slow.
    assert files_below(folder) - {".verified.json"} == names | {"README.md", "config.json", "report.json"}


def test_the_report_counts_all_that_was_tried(generate):
    folder = generate(noises_per_prompt=3)
    report = json.loads((folder / "report.json").read_text())
    pairs = open_pairs(folder)
    rejected = [r for path in folder.glob("rejected/*") for r in read_table(path)]
    everything = [*pairs.records, *rejected]
    assert (report["tried"], report["kept"], report["rejected"]) == (15, len(pairs), len(rejected))
    assert report["win_rate"] == pytest.approx(len(pairs) / 15)
    mean = sum(record.reward_golden for record in everything) / 15
    assert report["mean_reward_golden"] == pytest.approx(mean)
    mean = sum(record.std for record in pairs.records) / len(pairs)
    assert report["noise_of_kept"]["std"] == pytest.approx(mean)
    assert report["this_run"]["tried"] == 15
    assert report["this_run"]["pairs_per_second"] > 0
    assert report["this_run"]["num_processes"] == 1


def test_the_facts_say_how_a_set_was_made(generate):
    facts = open_pairs(generate()).facts
    assert facts["reward"] == {"name": "brightness", "version": "1"}
    assert (facts["w1"], facts["w2"], facts["redenoise_steps"], facts["margin"]) == (5.5, 1, 10, 0)
    assert facts["scheduler"]["_class_name"] == "DDIMScheduler"
    assert {"unet", "text_encoder", "vae"} <= facts["models"].keys()
    assert facts["prompts"]["count"] == 5
    assert facts["num_inference_steps"] == 2


def test_sequences_without_a_filter(generate, monkeypatch):
    def refuse(*_):
        raise AssertionError("a picture was drawn")

    monkeypatch.setattr(candidates, "render", refuse)
    folder = generate(num_steps=3, no_filter=True, reward=None)
    pairs = open_pairs(folder)
    assert (len(pairs), pairs.num_steps) == (5, 3)
    assert pairs.facts["reward"] is None
    assert "vae" not in pairs.facts["models"]
    assert pairs.records[0].reward_golden is None
    item = pairs[0]
    moves = [(state - item["noise"]).norm() for state in item["golden"]]
    assert 0 < moves[0] < moves[1] < moves[2]
    report = json.loads((folder / "report.json").read_text())
    assert (report["kept"], report["rejected"]) == (5, 0)
    assert "win_rate" not in report


def test_a_csv_of_prompts_and_a_limit(generate, tmp_path):
    path = tmp_path / "prompts.csv"
    path.write_text('id,text\n1,"a red, big seven"\n2,None\n3,None\n4,a blue two\n')
    folder = generate(prompt_file=path, prompt_column="text", max_prompts=2, no_filter=True)
    assert open_pairs(folder).prompts == ["a red, big seven", "None"]


def test_other_noise_for_another_seed_and_the_same_for_the_same(generate):
    folders = [generate(f"set {i}", no_filter=True, seed=seed) for i, seed in enumerate((0, 0, 1))]
    first, again, other = (open_pairs(folder) for folder in folders)
    assert first.records == again.records
    assert torch.equal(first[4]["golden"], again[4]["golden"])
    assert not {r.seed for r in first.records} & {r.seed for r in other.records}


def test_another_size_than_the_models_own(generate):
    assert open_pairs(generate(output_size=48, no_filter=True)).latent_shape == (4, 12, 12)


def test_the_published_inversion_and_the_strength_are_options(generate):
    goldens = []
    for index, options in enumerate(
        ({}, {"legacy_inversion": True}, {"redenoise_steps": 20}, {"w1": 3.0}, {"w2": 0.5})
    ):
        pairs = open_pairs(generate(f"set {index}", max_prompts=1, no_filter=True, **options))
        goldens.append(pairs[0]["golden"])
    for index, golden in enumerate(goldens):
        assert not any(torch.equal(golden, other) for other in goldens[:index])


def test_the_command_line_of_the_original_system_is_understood():
    args = generate_npd.parse_args(
        ["--prompt_file", "p.txt", "--output_dir", "out", "--num_steps", "10"]
        + ["--max_prompts", "1000", "--output_size", "1024"]
    )
    assert args.pretrained_model_name_or_path == SDXL
    assert (args.num_steps, args.max_prompts, args.output_size) == (10, 1000, 1024)
    assert args.reward == "hpsv2"


def test_a_file_for_all_scripts_may_hold_the_other_name_of_the_base_model(tmp_path):
    path = tmp_path / "all.yaml"
    path.write_text("base_model_id: some/base\nprompt_file: p\noutput_dir: o\nuse_ema: true\n")
    args = generate_npd.parse_args(["--config", str(path)])
    assert args.pretrained_model_name_or_path == "some/base"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_steps": 0}, "`num_steps` must be at least 1, got 0"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"shard_size": 0}, "`shard_size` must be at least 1, got 0"),
        ({"noises_per_prompt": 0}, "`noises_per_prompt` must be at least 1"),
        ({"w1": "nan"}, "`w1` must be a finite number, got nan"),
        ({"margin": "inf"}, "`margin` must be a finite number, got inf"),
        ({"seed": -1}, "`seed` must be from 0 to .*, got -1"),
        ({"prompt_file": "nowhere.txt"}, "got nowhere.txt: no such file"),
        ({"output_size": 30}, "`output_size` must be divisible by 4 .* got 30"),
        ({"reward": "brightness"}, "`reward` must be one of .* got 'brightness'"),
        ({"pretrained_model_name_or_path": MODEL_DIR / "unet"}, "or Hub name of a pipeline, got"),
        ({"resume_from_checkpoint": "latest"}, "got 'latest' but .*set holds none"),
        ({"resume_from_checkpoint": "5"}, "must be 'latest' for noise pairs, got '5'"),
    ],
)
def test_bad_input_is_refused_and_leaves_nothing(generate, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(**arguments)
    assert not (tmp_path / "set").exists()


def test_an_empty_prompt_file(generate, tmp_path):
    with pytest.raises(ValueError, match="must hold at least one prompt, got none in .*empty.txt"):
        generate(prompt_file=write_prompt_file(tmp_path / "empty.txt", ("", " ")))


def test_an_output_folder_that_is_a_file(generate, tmp_path):
    (tmp_path / "set").write_text("")
    with pytest.raises(ValueError, match="`output_dir` must be a folder, got .*set"):
        generate()


def test_no_pair_passes_the_filter(generate, tmp_path):
    message = "at least one pair pass, got none of 5: the highest gain is .* Lower `--margin`"
    with pytest.raises(ValueError, match=message):
        generate(margin=300.0)
    folder = tmp_path / "set"
    rejected = [r for path in sorted(folder.glob("rejected/*")) for r in read_table(path)]
    assert [record.index for record in rejected] == [0, 1, 2, 3, 4]
    report = json.loads((folder / "report.json").read_text())
    assert (report["kept"], report["rejected"]) == (0, 5)
    assert report["highest_gain"] == max(r.reward_golden - r.reward_source for r in rejected)


def test_rewards_that_are_not_numbers_keep_what_was_made(generate, tmp_path):
    reward = BRIGHTNESS.replace("Brightness", "BrokenForNine")
    with pytest.raises(ValueError, match="The scores of 'broken' must be numbers, got nan .*nine"):
        generate(reward=reward, noises_per_prompt=3, shard_size=5, batch_size=2)
    folder = tmp_path / "set"
    # "nine" is the last prompt: all shards but its own are there, and the batches before it.
    assert len(list(folder.glob("shards/*.json"))) == 2
    assert len(list(folder.glob("progress/00002/*"))) == 1
    assert not open_pairs(folder).complete


def test_a_broken_shard_is_made_again_when_it_is_taken_out(generate, tmp_path):
    folder = generate()
    before = {name: (folder / name).read_bytes() for name in files_below(folder) - {"report.json"}}
    path = folder / "deltas/00000.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="Remove shards/00000.json"):
        generate(resume_from_checkpoint="latest")
    (folder / "shards/00000.json").unlink()
    generate(resume_from_checkpoint="latest")
    after = {name: (folder / name).read_bytes() for name in before}
    assert after == before
