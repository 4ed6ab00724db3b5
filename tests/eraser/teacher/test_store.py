from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from diffusers_ext.eraser.teacher.store import TeacherSamples, open_teacher_samples, to_storage
from examples.moving_digits.prompts import PROMPT_LENGTH
from tests.eraser.teacher_runs import CountedVelocity, collect, tiny_teacher
from tests.tiny_erasers import add_random_eraser

FACTS = {"prompts": ["a red seven", ""], "text_encoder": "tiny"}


@pytest.fixture(scope="module")
def teacher():
    return tiny_teacher()


@pytest.fixture(scope="module")
def folder(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("samples") / "set"
    pipeline, velocity, texts = teacher
    collect(velocity, pipeline, texts, directory=folder, facts=FACTS)
    return folder


MASKED = {
    "facts": FACTS,
    "token_mask": torch.ones(2, PROMPT_LENGTH, dtype=torch.bool),
    "num_preserved": 0,
    "num_target": 4,
}


@pytest.fixture(scope="module")
def masked_folder(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("samples") / "masked"
    pipeline, velocity, texts = teacher
    collect(velocity, pipeline, texts, directory=folder, **MASKED)
    return folder


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_files_hold_what_memory_holds(teacher, folder):
    pipeline, velocity, texts = teacher
    kept, in_memory = open_teacher_samples(folder), collect(velocity, pipeline, texts)
    assert len(kept) == len(in_memory) == 16
    for index in range(len(kept)):
        a, b = kept[index], in_memory[index]
        assert a.keys() == b.keys() == {"target", "preserved"}
        for part in a:
            assert a[part].keys() == b[part].keys()
            for name in a[part]:
                assert torch.equal(a[part][name], b[part][name]), name
                assert a[part][name].dtype == b[part][name].dtype


@pytest.mark.parametrize("calls", [0, 3, 9, 14])
def test_a_killed_collection_resumes_to_the_same_bits(teacher, folder, tmp_path, calls):
    pipeline, velocity, texts = teacher
    options = {"directory": tmp_path / "set", "facts": FACTS}
    with pytest.raises(KeyboardInterrupt):
        collect(CountedVelocity(velocity, calls), pipeline, texts, **options)
    before = contents(tmp_path / "set")
    assert before.keys() < contents(folder).keys()
    with pytest.raises(ValueError, match="is missing. Collect again to continue"):
        open_teacher_samples(tmp_path / "set")
    counted = CountedVelocity(velocity)
    collect(counted, pipeline, texts, **options)
    assert contents(tmp_path / "set") == contents(folder)
    assert len(counted.rows) == 16 - 4 * (calls // 4)


@pytest.mark.parametrize("calls", [3, 68])  # before and after the weights of the heads are there
def test_a_killed_collection_with_masks_resumes_to_the_same_bits(teacher, masked_folder, tmp_path, calls):
    pipeline, velocity, texts = teacher
    options = MASKED | {"directory": tmp_path / "set"}
    with pytest.raises(KeyboardInterrupt):
        collect(CountedVelocity(velocity, calls), pipeline, texts, **options)
    heads = tmp_path / "set" / "head_weights.safetensors"
    assert heads.is_file() == (calls == 68)
    (tmp_path / "set" / ".head_weights.safetensors.killed").write_bytes(b"half")
    counted = CountedVelocity(velocity)
    found = collect(counted, pipeline, texts, **options)
    assert contents(tmp_path / "set") == contents(masked_folder)
    assert torch.equal(found.head_weights, load_file(heads)["head_weights"])
    # 8 runs of 4 steps and their 32 states for the heads, 2 batches of 4 steps, of which 1 is there.
    assert len(counted.rows) == (72 if calls == 3 else 4)
    heads.write_bytes(b"")
    with pytest.raises(ValueError, match=r"head_weights.safetensors must be a whole safetensors"):
        open_teacher_samples(tmp_path / "set")


def test_a_batch_of_which_a_part_is_there_gives_the_same_bits(teacher, folder, tmp_path):
    pipeline, velocity, texts = teacher
    options = {"directory": tmp_path / "set", "facts": FACTS}
    collect(velocity, pipeline, texts, **options)
    lost = tmp_path / "set" / "preserved" / "00003.safetensors"
    lost.unlink()
    (lost.parent / ".00003.safetensors.killed").write_bytes(b"half")
    collect(velocity, pipeline, texts, **options)
    assert contents(tmp_path / "set") == contents(folder)


def test_a_finished_set_asks_the_model_nothing(teacher, folder):
    pipeline, velocity, texts = teacher
    counted = CountedVelocity(velocity)
    collect(counted, pipeline, texts, directory=folder, facts=FACTS)
    assert counted.rows == []


def test_processes_share_the_runs(teacher, folder, tmp_path):
    pipeline, velocity, texts = teacher
    options = {"directory": tmp_path / "set", "facts": FACTS}
    asked = []

    def other():
        asked.append("before this process opens the set")
        collect(velocity, pipeline, texts, **options, process=(1, 2))

    counted = CountedVelocity(velocity)
    collect(counted, pipeline, texts, **options, process=(0, 2), wait_for_everyone=other)
    assert len(asked) == 1
    assert len(counted.rows) == 8
    assert contents(tmp_path / "set") == contents(folder)


def test_half_precision_on_disk_is_read_as_float32(teacher, tmp_path):
    pipeline, velocity, texts = teacher
    tokens = torch.zeros(2, PROMPT_LENGTH, dtype=torch.bool)
    tokens[:, 2] = True
    found = collect(
        velocity,
        pipeline,
        texts,
        token_mask=tokens,
        directory=tmp_path / "set",
        facts=FACTS,
        storage_dtype=torch.float16,
    )
    stored = load_file(tmp_path / "set" / "target" / "00000.safetensors")
    assert stored["x_t"].dtype == stored["mask"].dtype == torch.float16
    assert stored["t"].dtype == torch.int64
    item = found[0]["target"]
    assert item["x_t"].dtype == item["mask"].dtype == torch.float32
    assert torch.equal(item["x_t"], stored["x_t"][0].float())


def test_samples_can_be_sent_to_workers(folder):
    samples = open_teacher_samples(folder)
    first = samples[5]
    again = pickle.loads(pickle.dumps(samples))[5]
    assert torch.equal(first["target"]["x_t"], again["target"]["x_t"])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, "settings.seed differ"),
        ({"num_target": 2}, "settings.num_target differ"),
        ({"guidance_scale": 2.0}, "settings.guidance_scale differ"),
        ({"storage_dtype": torch.float16}, "settings.dtype differ"),
        ({"facts": {**FACTS, "prompts": ["a blue seven", ""]}}, "facts.prompts differ"),
        ({"token_mask": torch.ones(2, PROMPT_LENGTH, dtype=torch.bool)}, "settings.masks differ"),
    ],
)
def test_samples_made_otherwise_are_refused(teacher, folder, changes, named):
    pipeline, velocity, texts = teacher
    before = contents(folder)
    with pytest.raises(ValueError, match=f"got others: {named}"):
        collect(velocity, pipeline, texts, **{"directory": folder, "facts": FACTS, **changes})
    assert contents(folder) == before


def test_samples_of_another_model_or_scheduler_are_refused(teacher, folder):
    pipeline, velocity, texts = teacher
    other = copy.copy(velocity)
    other.transformer = copy.deepcopy(velocity.transformer)
    with torch.no_grad():
        other.transformer.proj_out.weight.mul_(1.1)
    with pytest.raises(ValueError, match="others: model differ"):
        collect(other, pipeline, texts, directory=folder, facts=FACTS)
    changed = copy.copy(pipeline)
    changed.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, snr_shift_scale=3.0)
    with pytest.raises(ValueError, match="others: scheduler differ"):
        collect(velocity, changed, texts, directory=folder, facts=FACTS)


def test_an_eraser_in_the_model_does_not_make_it_another_one(folder):
    pipeline, velocity, texts = tiny_teacher()
    add_random_eraser(velocity.model)
    counted = CountedVelocity(velocity)
    collect(counted, pipeline, texts, directory=folder, facts=FACTS)
    assert counted.rows == []


def test_other_folders_are_refused(teacher, folder, tmp_path):
    pipeline, velocity, texts = teacher
    with pytest.raises(ValueError, match="`facts` must say of which model"):
        collect(velocity, pipeline, texts, directory=tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"must be empty or hold samples, got .*\['notes.txt'\]"):
        collect(velocity, pipeline, texts, directory=tmp_path, facts=FACTS)
    with pytest.raises(ValueError, match=r"must hold samples of a collection, got no config.json"):
        open_teacher_samples(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "PairDataset"}))
    with pytest.raises(ValueError, match="must describe TeacherSamples of format 1, got 'PairDat"):
        open_teacher_samples(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="must hold JSON"):
        open_teacher_samples(tmp_path)


def test_a_damaged_file_is_named(teacher, tmp_path):
    pipeline, velocity, texts = teacher
    found = collect(velocity, pipeline, texts, directory=tmp_path / "set", facts=FACTS)
    path = tmp_path / "set" / "target" / "00001.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"00001.safetensors must be a whole safetensors file"):
        found[4]


def part(runs, points=2):
    return [
        {"t": torch.tensor(point + 10 * run), "x_t": torch.full((3,), float(run))}
        for run in range(runs)
        for point in range(points)
    ]


def test_rows_of_the_shorter_part_come_again():
    samples = TeacherSamples({"target": part(1), "preserved": part(3)})
    assert len(samples) == 6
    assert [int(samples[i]["target"]["t"]) for i in range(6)] == [0, 1] * 3
    assert [int(samples[i]["preserved"]["t"]) for i in range(6)] == [0, 1, 10, 11, 20, 21]
    with pytest.raises(IndexError, match="from 0 to 5, got 6"):
        samples[6]


def test_a_loader_makes_batches_of_items():
    batch = next(iter(DataLoader(TeacherSamples({"target": part(2)}), batch_size=4)))
    assert batch.keys() == {"target"}
    assert batch["target"]["x_t"].shape == (4, 3)
    assert batch["target"]["t"].dtype == torch.int64


@pytest.mark.parametrize("parts", [{}, {"target": []}, {"other": part(1)}])
def test_parts_must_have_rows_and_known_names(parts):
    with pytest.raises(ValueError, match="`parts` must have rows, of"):
        TeacherSamples(parts)


def test_storage_casts_numbers_and_keeps_indices():
    rows = {"x_t": torch.tensor([[1.0], [7e4]]), "prompt": torch.tensor([3, 4])}
    stored = to_storage(rows, torch.bfloat16)
    assert stored["x_t"].dtype == torch.bfloat16
    assert stored["prompt"].dtype == torch.int64
    with pytest.raises(ValueError, match="`x_t` must be finite, got NaN or infinity for prompt 4"):
        to_storage(rows, torch.float16)
