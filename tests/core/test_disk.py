from __future__ import annotations

import errno
import os

import pytest
import torch
from safetensors import SafetensorError

from diffusers_ext.core.artifacts import full_disk_named, write_atomically
from diffusers_ext.core.result_folder import staged_output


def caused_by(cause: Exception) -> Exception:
    error = RuntimeError("failed")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc] PytorchStreamWriter failed writing"),
        caused_by(OSError(errno.EDQUOT, "Disk quota exceeded")),
    ],
)
def test_a_full_disk_is_one_error_that_names_the_place(tmp_path, error):
    with pytest.raises(OSError, match="No space is left for .*out: free some") as caught:
        with full_disk_named(tmp_path / "out"):
            raise error
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(tmp_path / "out")


@pytest.mark.parametrize("error", [OSError(errno.EACCES, "denied"), RuntimeError("other")])
def test_other_errors_stay_what_they_are(tmp_path, error):
    with pytest.raises(type(error)) as caught, full_disk_named(tmp_path):
        raise error
    assert caught.value is error


def test_whoever_writes_names_the_file(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("diffusers_ext.core.artifacts.os.fsync", full)
    with pytest.raises(OSError, match="weights"):
        write_atomically(tmp_path / "weights", b"1")
    assert not list(tmp_path.iterdir())
    with pytest.raises(OSError, match="out/.partial-output/weights"):
        with staged_output(tmp_path / "out") as folder:
            write_atomically(folder / "weights", torch.zeros(1).numpy().tobytes())
    assert not (tmp_path / "out").exists()
