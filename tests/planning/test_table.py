from __future__ import annotations

import torch

from diffusers_ext.planning.plan import GIB, PhasePlan, RunPlan, size_text, time_text


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
