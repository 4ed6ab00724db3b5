"""What optimizers take by their stand-ins, and what they really take."""

from __future__ import annotations

import io

import pytest
import torch

from benchmarks.measured_memory import peak_bytes
from diffusers_ext.core.settings import OPTIMIZERS, TrainingSettings
from diffusers_ext.planning.optimizers import optimizer_bytes, planned_optimizer, state_bytes
from diffusers_ext.training.run.optimizers import make_optimizer

SIZES = ((640, 320), (320, 320), (320,))  # the last keeps float32 in 8 bits
PER_ELEMENT = {"adamw": 8, "adamw_fused": 8, "adamw_8bit": 2 + 8 / 256, "prodigy": 16, "schedule_free": 8}


def weights() -> list[torch.nn.Parameter]:
    made = [torch.nn.Parameter(torch.randn(size)) for size in SIZES]
    for weight in made:
        weight.grad = torch.randn_like(weight)
    return made


def kept(optimizer: torch.optim.Optimizer) -> int:
    found = {id(x): x.nbytes for state in optimizer.state.values() for x in state.values() if torch.is_tensor(x)}
    return sum(found.values())


def test_bytes_of_every_optimizer(subtests):
    assert PER_ELEMENT.keys() == OPTIMIZERS.keys()
    for name, each in PER_ELEMENT.items():
        with subtests.test(name=name):
            assert state_bytes([torch.empty(1000, 1000)], name) == pytest.approx(each * 10**6, rel=0.002)
            assert state_bytes([], name) == optimizer_bytes([], name) == 0


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_and_the_file_take_what_is_planned(name):
    pytest.importorskip(OPTIMIZERS[name][0])
    rate = 1.0 if name == "prodigy" else 1e-3
    settings = TrainingSettings(learning_rate=rate, optimizer=name, lr_scheduler="constant", adam_weight_decay=0.0)
    trained = weights()
    planned, real = planned_optimizer(name, weights(), as_on_gpu=False), make_optimizer(settings, trained)
    if name == "schedule_free":
        real.train()
    peaks = []
    for optimizer in (planned, real):
        optimizer.step()
        peaks.append(peak_bytes(optimizer.step))
    if name != "adamw_8bit":  # one kernel on a GPU, and operations of torch on a CPU
        assert peaks[0] == pytest.approx(peaks[1], rel=0.15, abs=4096)
    assert kept(planned) == pytest.approx(kept(real), rel=0.01)
    buffer = io.BytesIO()
    torch.save(real.state_dict(), buffer)
    assert optimizer_bytes((w.to("meta") for w in trained), name) == pytest.approx(buffer.tell(), rel=0.02)
    assert state_bytes((w.to("meta") for w in trained), name) == kept(planned)
