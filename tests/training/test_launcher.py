"""Who a process is among those that a launcher has started."""

from __future__ import annotations

import pytest

from diffusers_ext.training.run.launcher import process_count, process_rank

ALONE = ("RANK", "WORLD_SIZE", "PMI_RANK", "PMI_SIZE")


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, (1, 2)),
        ({"PMI_RANK": "2", "PMI_SIZE": "3"}, (2, 3)),
        ({"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"}, (3, 4)),
        ({"MV2_COMM_WORLD_RANK": "1", "MV2_COMM_WORLD_SIZE": "8"}, (1, 8)),
        ({"RANK": "0", "PMI_RANK": "5"}, (0, 1)),  # what torch reads goes first
        ({"RANK": "-1", "WORLD_SIZE": ""}, (0, 1)),
    ],
)
def test_every_launcher_is_known(told, expected, monkeypatch):
    for name in ALONE:
        monkeypatch.delenv(name, raising=False)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert (process_rank(), process_count()) == expected
