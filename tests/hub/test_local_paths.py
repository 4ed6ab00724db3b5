from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffusers_ext.core.config_digest import config_digest
from diffusers_ext.hub.upload_files import public_content


def test_paths_become_names_and_all_else_stays(tmp_path):
    model = tmp_path / "mödel"
    (model / "unet").mkdir(parents=True)
    (model / "model_index.json").write_text("{}")
    cached = str(tmp_path / "hub/models--user--name/snapshots/1a2b/vae")
    content = {
        "base": str(model), "unet": str(model / "unet"), "gone": [str(tmp_path / "gone")],
        "deep": {"cached": cached}, "hub": "user/name", "beside": "pictures/0.png",
    }  # fmt: skip
    kept = {"prompt": "/imagine a fox/or two", "slash": "/", "said": f'"{model}" it said', "é": 1.5}
    path = tmp_path / "training_report.json"
    for ascii_only in (True, False):
        text = json.dumps(content | kept, indent=3, ensure_ascii=ascii_only) + "\n"
        path.write_text(text, encoding="utf-8")
        found = public_content(path)
        assert json.loads(found) == kept | {
            "base": "mödel", "unet": "mödel", "gone": ["gone"], "deep": {"cached": "user/name"},
            "hub": "user/name", "beside": "pictures/0.png",
        }  # fmt: skip
        assert found.decode().splitlines()[-5:] == text.splitlines()[-5:]
        assert path.read_text(encoding="utf-8") == text


def test_a_checksum_of_the_config_fits_again_and_a_wrong_one_stays_wrong(tmp_path):
    config = {"base_model": str(tmp_path), "count": 3}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config | {"config_sha256": config_digest(config)}, indent=2))
    found = json.loads(public_content(path))
    assert found["base_model"] == tmp_path.name
    assert found["config_sha256"] == config_digest(found) != config_digest(config)
    path.write_text(json.dumps(config | {"config_sha256": "0" * 64}))
    assert json.loads(public_content(path))["config_sha256"] == "0" * 64


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", '{"a": "b"}'),
        ("adapter_config.json", "{broken"),
        ("report.json", b"\xff\xfe"),
        ("tokenizer.json", json.dumps({"path": str(Path(__file__))})),
    ],
)
def test_other_files_are_left_alone(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert public_content(path) is None
