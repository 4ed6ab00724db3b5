"""What tests of the examples share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from accelerate.state import AcceleratorState, GradientState


@pytest.fixture
def fresh_accelerator() -> Iterator[None]:
    """Accelerate keeps its state in globals, which a second run in one process would inherit."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
