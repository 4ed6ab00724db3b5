from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from diffusers_ext.core.restored_state import held_attribute


def test_the_last_one_restores_whatever_the_order():
    owner = SimpleNamespace(mode="train")
    contexts = [held_attribute(owner, "mode", value) for value in ("a", "b", "c")]
    for context in contexts:
        context.__enter__()
    contexts[0].__exit__(None, None, None)
    assert owner.mode == "c"
    contexts[2].__exit__(None, None, None)
    assert owner.mode == "b"
    contexts[1].__exit__(None, None, None)
    assert owner.mode == "train"


def test_an_absent_attribute_goes_again_also_after_an_exception():
    owner = SimpleNamespace()
    with pytest.raises(RuntimeError, match="stop"), held_attribute(owner, "bar", None):
        raise RuntimeError("stop" if vars(owner) == {"bar": None} else "not held")
    assert vars(owner) == {}


def test_many_threads_leave_it_as_it_was():
    owner, seen = SimpleNamespace(mode="train"), set()

    def hold() -> None:
        for _ in range(200):
            with held_attribute(owner, "mode", "eval"):
                seen.add(owner.mode)

    threads = [threading.Thread(target=hold) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"eval"}
    assert owner.mode == "train"


def test_a_writer_of_its_own():
    written = []
    with held_attribute(SimpleNamespace(x=1), "x", 2, lambda *args: written.append(args[1:])):
        pass
    assert written == [("x", 2), ("x", 1)]
