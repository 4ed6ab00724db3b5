from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import HfApi

from diffusers_ext.hub import Licence
from diffusers_ext.hub.kinds import find_licence, public_name


def put_card(repo_id: str, header: str, private: bool = False) -> None:
    api = HfApi()
    api.create_repo(repo_id, private=private, exist_ok=True)
    content = f"---\n{header}\n---\n\nWords.\n".encode()
    api.upload_file(path_or_fileobj=content, path_in_repo="README.md", repo_id=repo_id)


def test_the_public_name_holds_no_path():
    for source, name in (
        ("user/model", "user/model"),
        ("model", "model"),
        ("/somewhere/else/model", "model"),
        ("../models/model", "model"),
        ("a/b/model", "model"),
        ("/cache/hub/models--user--a-model/snapshots/1f/transformer", "user/a-model"),
        ("/cache/hub/datasets--user--pairs/snapshots/1f", "user/pairs"),
    ):
        assert public_name(source) == name


def test_a_folder_goes_by_its_last_part(tmp_path, monkeypatch):
    (tmp_path / "user" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert public_name("user/model") == "model"
    assert public_name(Path("user")) == "user"


def test_a_given_licence_is_taken_without_network(tmp_path):
    assert find_licence(tmp_path, "mit") == Licence("mit")
    own = Licence("other", "own", "https://a.b")
    assert find_licence("any", own) is own
    with pytest.raises(ValueError, match="`license_name` must be given with the license 'other'"):
        find_licence("any", "other")


def test_the_licence_of_the_base_model(hub):
    put_card("tester/base", "license: apache-2.0")
    assert find_licence("tester/base") == Licence("apache-2.0")
    put_card("tester/own", "license: other\nlicense_name: own-1\nlicense_link: LICENSE.md")
    link = f"{hub.endpoint}/tester/own/blob/main/LICENSE.md"
    assert find_licence("tester/own") == Licence("other", "own-1", link)
    put_card("tester/closed", "license: openrail++", private=True)
    assert find_licence("tester/closed", token="hf_test") == Licence("openrail++")
    cached = "/cache/models--tester--closed/snapshots/1f"
    assert find_licence(cached) == Licence("openrail++")


def test_the_licence_in_a_folder(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\nlicense_link: LICENSE\n---\n")
    assert find_licence(tmp_path) == Licence("mit")  # the link led nowhere from elsewhere


def test_no_licence_is_asked_for(hub, tmp_path):
    for header in (None, "tags: [a]", "license: other", "license: [mit, gpl]", "license: null"):
        if header is not None:
            put_card("tester/unclear", header)
        for base in ("tester/unclear", "a label", "label", tmp_path):
            with pytest.raises(ValueError, match="`license` must be given, got None, and the card"):
                find_licence(base)
    with pytest.raises(ValueError, match="`license` must be given"):
        find_licence("tester/closed-off", token="hf_stranger")


def test_a_licence_says_its_name():
    assert Licence("mit").sentence == "These files are shared under `mit`."
    named = Licence("other", "my-licence", "LICENSE.md")
    assert named.sentence == "These files are shared under [`my-licence`](LICENSE.md)."


def test_a_licence_without_a_name_is_refused():
    with pytest.raises(ValueError, match="`license_name` must be given with the license 'other'"):
        Licence("other")
    for nothing in ("", " ", None):
        with pytest.raises(ValueError, match="`license` must name a licence, got"):
            Licence(nothing)
