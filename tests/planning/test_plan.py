from __future__ import annotations

import json

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from benchmarks.measured_memory import peak_bytes
from benchmarks.planned_runs import DIGITS, IN_MEMORY, MOVING_DIGITS, RUNS
from diffusers_ext.golden_noise.networks.base import NETWORK_DEFAULTS
from diffusers_ext.planning import plan_run, setting_names, work
from diffusers_ext.planning.eraser import draft_eraser
from diffusers_ext.planning.models import read_base_model
from diffusers_ext.planning.plan import GIB, PhasePlan, RunPlan
from diffusers_ext.planning.settings import NETWORKS, EraserPlanSettings, GoldenNoisePlanSettings
from diffusers_ext.planning.table import size_text, time_text


@pytest.fixture
def fresh_accelerator():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.parametrize("make", RUNS, ids=lambda make: make.__name__)
def test_memory_and_files_of_a_real_run_are_as_planned(tmp_path, make, fresh_accelerator):
    run = make(tmp_path / "run", steps=2, sampling_steps=4)
    # Too little memory for anything to be timed.
    plan = plan_run(run.tool, run.model, gpu="here", memory_gib=1e-3, **run.setting)
    assert plan.fits is False
    assert plan.seconds is None
    measured = max(peak_bytes(script) for script in run.scripts.values())
    assert plan.peak == pytest.approx(measured, rel=0.15)
    written = plan.disk_total - plan.disk.get(IN_MEMORY, 0)
    assert written == pytest.approx(run.written, rel=0.15)


def test_a_plan_of_a_card_has_times_and_a_verdict():
    plan = plan_run("nullspace", DIGITS, gpu="RTX 4090", num_validation_prompts=1)
    assert [phase.name for phase in plan.phases] == ["statistics", "encoding", "training", "validation"]
    assert plan.fits is True
    assert plan.device == "RTX 4090"
    twice = plan_run("nullspace", DIGITS, gpu="4090", max_train_steps=2000)
    seconds = [found.phases[2].seconds for found in (plan, twice)]
    assert seconds[1] == pytest.approx(2 * seconds[0])
    facts = json.loads(json.dumps(plan.to_dict()))
    assert facts["peak"] == plan.peak == max(phase["peak"] for phase in facts["phases"])
    assert facts["setting"]["resolution"] == 32
    assert any("50%" in sentence for sentence in facts["assumptions"])


def test_a_plan_without_a_device_has_neither_times_nor_a_verdict():
    plan = plan_run("eraser", MOVING_DIGITS, rank=8, mixed_precision="no")
    assert plan.fits is None
    assert plan.seconds is None
    assert plan.missing == 0
    small = plan_run("eraser", MOVING_DIGITS, rank=8, mixed_precision="no", memory_gib=1.001)
    assert small.fits is False
    assert small.missing == small.peak + small.reserve - small.memory
    assert "Does not fit" in small.table()


def test_the_device_at_hand_is_timed(monkeypatch):
    monkeypatch.setattr(work, "_MOST_REPEATS", 3)
    plan = plan_run("eraser", MOVING_DIGITS, gpu="here", rank=8, mixed_precision="no")
    assert all(phase.seconds > 0 for phase in plan.phases)
    assert any("timed on this device" in sentence for sentence in plan.assumptions)


def test_bad_requests():
    with pytest.raises(ValueError, match=r"`tool` must be one of \('nullspace', .* got 'inversion'"):
        plan_run("inversion", DIGITS)
    with pytest.raises(ValueError, match="`setting` of 'eraser' must be among .* got 'ranks'"):
        plan_run("eraser", MOVING_DIGITS, ranks=8)
    with pytest.raises(ValueError, match="`model` must be the folder of a pipeline or one of"):
        plan_run("nullspace", "SD9")
    with pytest.raises(ValueError, match="`gpu` must be 'here' or one of"):
        plan_run("nullspace", DIGITS, gpu="RTX 9999")
    with pytest.raises(ValueError, match="`memory_gib` must be positive, got 0"):
        plan_run("nullspace", DIGITS, memory_gib=0)
    with pytest.raises(ValueError, match="`model` must be a .*CogVideoX pipeline for the eraser"):
        plan_run("eraser", DIGITS)
    with pytest.raises(ValueError, match="`model` must be a pipeline of .*CogVideoXPipeline"):
        plan_run("golden-noise", MOVING_DIGITS)
    with pytest.raises(ValueError, match="`model` must be a pipeline of .*FluxPipeline.* got HunyuanDiTPipeline"):
        plan_run("nullspace", "Hunyuan-DiT")


@pytest.mark.parametrize(
    ("tool", "setting", "message"),
    [
        ("nullspace", {"max_train_steps": 0}, "`max_train_steps` must be at least 1, got 0"),
        ("nullspace", {"mixed_precision": "fp8"}, "`mixed_precision` must be one of .* got 'fp8'"),
        ("nullspace", {"features": ["x"]}, "`features` must be among"),
        ("nullspace", {"resolution": 30}, "`resolution` must be a multiple of 4"),
        ("nullspace", {"full_finetune": True, "directions": "plain"}, "`full_finetune` must come"),
        ("golden-noise", {"network": "cnn"}, "`network` must be one of"),
        ("golden-noise", {"network": "rnn"}, "`num_steps` must be at least 2 for the rnn, got 1"),
        ("golden-noise", {"kept_share": 0}, r"`kept_share` must be in \(0, 1\], got 0"),
        ("golden-noise", {"validation_split": 1.0}, "`validation_split` must be in"),
        ("golden-noise", {"num_prompts": 2, "kept_share": 0.1}, "at least one pair to train on"),
    ],
)
def test_bad_settings(tool, setting, message):
    with pytest.raises(ValueError, match=message):
        plan_run(tool, DIGITS, **setting)


@pytest.mark.parametrize("name", ["validation_steps", "checkpointing_steps", "num_preserved_trajectories"])
def test_bad_settings_of_an_eraser(name):
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
        plan_run("eraser", MOVING_DIGITS, **{name: 0})


def test_a_folder_without_all_components_of_a_cogvideox(tmp_path):
    names = ("transformer", "vae")
    for name in names:
        (tmp_path / name).mkdir()
        config = (MOVING_DIGITS / name / "config.json").read_bytes()
        (tmp_path / name / "config.json").write_bytes(config)
    index = {name: json.loads((MOVING_DIGITS / "model_index.json").read_bytes())[name] for name in names}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="`model` must have a text_encoder, got"):
        plan_run("eraser", tmp_path)


def test_clips_of_each_validation_and_once_of_the_base_model():
    base, shared = read_base_model(MOVING_DIGITS), {"mixed_precision": "no", "validation": True}
    for steps, clips in ((None, 2), (200, 4)):
        setting = EraserPlanSettings(rank=8, max_train_steps=500, validation_steps=steps, **shared)
        draft = draft_eraser(base, setting)
        works = {work.name: work.times for work in draft.phases[-1].works}
        assert works == {"teacher's pass": 50 * clips, "VAE's decoding": clips}


@pytest.mark.parametrize("network", NETWORKS)
def test_networks_train_as_long_as_by_their_script(network):
    usual = NETWORK_DEFAULTS[network]
    setting = GoldenNoisePlanSettings(network=network, num_steps=3, gradient_accumulation_steps=2)
    batch, epochs = usual["train_batch_size"], usual["num_epochs"]
    assert setting.train_batch_size == batch
    assert setting.max_train_steps == -(-950 * epochs // (2 * batch))
    given = GoldenNoisePlanSettings(train_batch_size=4, max_train_steps=7)
    assert (given.train_batch_size, given.max_train_steps) == (4, 7)


def test_setting_names_are_those_of_the_training_scripts():
    assert {"rank", "max_train_steps", "train_batch_size"} <= set(setting_names("nullspace"))
    assert {"w1", "noises_per_prompt", "use_ema"} <= set(setting_names("golden-noise"))
    with pytest.raises(ValueError, match="`tool` must be one of"):
        setting_names("inversion")


def plan(**changes):
    facts = {
        "tool": "eraser",
        "model": "user/model",
        "setting": {"rank": 8, "layers": ("a", "b"), "dtype": torch.float16, "more": {"x": 1}},
        "parts": {"transformer": 3 * GIB, "eraser": 1536},
        "phases": (PhasePlan("text", GIB, 30.0), PhasePlan("training", 5 * GIB, 7200.0)),
        "disk": {"eraser": 2048},
        "download": 2 * GIB,
        "device": "RTX 4090",
        "memory": 24 * GIB,
        "assumptions": ("Something that is long enough to need more than one line of the text. " * 2,),
    }
    return RunPlan(**{**facts, **changes})


def test_units_fit_the_numbers():
    assert [size_text(size) for size in (12, 2048, 3 * 2**20, GIB, 2**41)] == [
        "12 B",
        "2.00 KiB",
        "3.00 MiB",
        "1.00 GiB",
        "2.00 TiB",
    ]
    assert [time_text(seconds) for seconds in (None, 0.01, 3.0, 150, 7300, 200_000)] == [
        "-",
        "10.00 ms",
        "3.0 s",
        "2.5 min",
        "2.0 h",
        "2.3 d",
    ]


def test_the_table_is_aligned_and_complete():
    lines = plan().table().splitlines()
    assert lines[0] == "Plan: eraser with user/model on RTX 4090"
    assert lines[2].startswith("Fits: peak 5.00 GiB while training, of 24.00 GiB")
    assert lines[4] == "Setting: rank 8, layers a b, dtype float16, more {x 1}"
    columns = [line for line in lines if line.startswith(("text", "training", "all phases"))]
    assert columns == [
        "text           1.00 GiB    30.0 s",
        "training       5.00 GiB *   2.0 h",
        "all phases     5.00 GiB     2.0 h",
    ]
    assert {"transformer 3.00 GiB", "eraser 1.50 KiB"} <= {" ".join(line.split()) for line in lines}
    assert max(map(len, lines)) <= 88


def test_what_is_not_known_is_not_claimed():
    phases = (PhasePlan("training", 5 * GIB, None),)
    text = plan(device=None, memory=None, phases=phases, assumptions=()).table()
    assert "Name a GPU or its memory to see whether it fits: peak 5.00 GiB while training." in text
    assert "Assumed" not in text
    assert "training       5.00 GiB *     -" in text
    small = plan(memory=4 * GIB)
    assert (small.fits, small.missing) == (False, 2 * GIB)
    assert "Does not fit: peak 5.00 GiB while training, 2.00 GiB more than there is" in small.table()
