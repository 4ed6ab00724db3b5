"""The local Hub itself, asked by the real client."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from huggingface_hub import HfApi, ModelCard, constants, get_session, hf_hub_download, hf_hub_url, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from diffusers_ext.hub.connection import validate_card
from tests.hub_errors import CONNECTION_LOST, CONNECTION_REFUSED, LOST, TRUNCATED_IS_TRIED_AGAIN
from tests.hub_server import HubServer

WEIGHTS = os.urandom(3000)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "folder"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "weights.safetensors").write_bytes(WEIGHTS)
    (folder / "deep" / "er" / "config.json").write_text("{}")
    (folder / "README.md").write_text("---\nlicense: mit\ntags: [a]\n---\n# Words\n")
    return folder


@pytest.fixture
def repo(hub, folder):
    api = HfApi()
    api.create_repo("tester/thing")
    api.upload_folder(repo_id="tester/thing", folder_path=folder)
    return api


@pytest.mark.parametrize("repo_type", ["model", "dataset"])
def test_what_is_pushed_comes_back(hub, folder, tmp_path, repo_type):
    api = HfApi()
    url = api.create_repo("thing", repo_type=repo_type)
    assert url.repo_id == "tester/thing"
    assert api.create_repo("thing", repo_type=repo_type, exist_ok=True) == url
    commit = api.upload_folder(repo_id="tester/thing", folder_path=folder, repo_type=repo_type)
    files = hub.files("tester/thing", repo_type)
    assert sorted(files) == ["README.md", "deep/er/config.json", "weights.safetensors"]
    cached = snapshot_download("tester/thing", repo_type=repo_type, cache_dir=tmp_path / "cache")
    for name, content in files.items():
        with open(os.path.join(cached, name), "rb") as handle:
            assert handle.read() == content == (folder / name).read_bytes()
    info = api.repo_info("tester/thing", repo_type=repo_type, files_metadata=True)
    assert info.sha == commit.oid
    (weights,) = (s for s in info.siblings if s.rfilename == "weights.safetensors")
    assert (weights.size, weights.lfs.sha256) == (3000, hashlib.sha256(WEIGHTS).hexdigest())
    tree = api.list_repo_tree("tester/thing", repo_type=repo_type)
    assert [entry.path for entry in tree] == [
        ".gitattributes", "README.md", "deep", "weights.safetensors"
    ]  # fmt: skip
    (config,) = api.list_repo_tree("tester/thing", "deep/er", repo_type=repo_type)
    assert (config.path, config.size) == ("deep/er/config.json", 2)
    found = api.get_paths_info("tester/thing", ["deep", "README.md", "no"], repo_type=repo_type)
    assert [entry.path for entry in found] == ["README.md", "deep"]
    assert "a" in info.tags
    assert info.card_data.license == "mit"


@pytest.mark.parametrize("time", ["first", "second"])
def test_a_download_is_not_there_for_the_next_test(repo, time):
    cache = Path(constants.HF_HUB_CACHE)
    assert not (cache / "models--tester--thing").exists()
    assert Path(hf_hub_download("tester/thing", "README.md")).is_relative_to(cache)


def test_nothing_is_sent_twice(hub, repo, folder):
    assert len(hub.sent("PUT", "lfs-objects")) == 1
    first = repo.model_info("tester/thing").sha
    again = repo.upload_folder(repo_id="tester/thing", folder_path=folder)
    assert again.oid == first
    (folder / "README.md").write_text("new")
    assert repo.upload_folder(repo_id="tester/thing", folder_path=folder).oid != first
    assert len(hub.sent("PUT", "lfs-objects")) == 1
    assert [c.title for c in repo.list_repo_commits("tester/thing")][1:] == [
        "Upload folder using huggingface_hub", "initial commit"
    ]  # fmt: skip


def test_revisions_are_states_of_their_own(hub, repo, tmp_path):
    first = repo.model_info("tester/thing").sha
    repo.create_branch("tester/thing", branch="v2/next")
    repo.create_branch("tester/thing", branch="v2/next", exist_ok=True)
    repo.create_tag("tester/thing", tag="v1")
    for arguments in ({"revision": "v2/next"}, {"create_pr": True}):
        operation = {"path_or_fileobj": b"new", "path_in_repo": "deep/er/config.json"}
        commit = repo.upload_file(repo_id="tester/thing", **operation, **arguments)
    assert commit.pr_url == f"{hub.endpoint}/tester/thing/discussions/1"
    assert commit.pr_revision == "refs/pr/1"
    for revision, content in {
        "main": b"{}", first: b"{}", "v1": b"{}",
        "v2/next": b"new", "refs/pr/1": b"new", commit.oid: b"new",
    }.items():  # fmt: skip
        path = hf_hub_download(
            "tester/thing", "config.json", subfolder="deep/er", revision=revision, cache_dir=tmp_path
        )
        with open(path, "rb") as handle:
            assert handle.read() == content, revision
        assert hub.files("tester/thing", revision=revision)["deep/er/config.json"] == content
    refs = repo.list_repo_refs("tester/thing", include_pull_requests=True)
    assert {r.name for r in refs.branches} == {"main", "v2/next"}
    assert ([r.name for r in refs.tags], len(refs.pull_requests)) == (["v1"], 1)
    repo.delete_tag("tester/thing", tag="v1")
    repo.delete_branch("tester/thing", branch="v2/next")
    for revision in ("v1", "v2/next", "0" * 40):
        with pytest.raises(RevisionNotFoundError, match="Revision Not Found"):
            repo.model_info("tester/thing", revision=revision)


def test_files_are_deleted_and_changed_in_one_commit(hub, repo, folder):
    (folder / "weights.safetensors").unlink()
    repo.upload_folder(repo_id="tester/thing", folder_path=folder, delete_patterns=["*.safetensors"])
    repo.delete_folder("deep", repo_id="tester/thing")
    assert sorted(hub.files("tester/thing")) == ["README.md"]
    repo.delete_repo("tester/thing")
    with pytest.raises(RepositoryNotFoundError, match="Repository Not Found"):
        repo.model_info("tester/thing")
    repo.delete_repo("tester/thing", missing_ok=True)


@pytest.mark.parametrize("token", [False, "hf_stranger"])
def test_private_repositories_are_seen_by_their_owner_only(hub, folder, tmp_path, token):
    api = HfApi()
    api.create_repo("tester/secret", private=True)
    api.upload_folder(repo_id="tester/secret", folder_path=folder)
    assert api.model_info("tester/secret").private
    with pytest.raises(RepositoryNotFoundError, match="Repository Not Found"):
        api.model_info("tester/secret", token=token)
    with pytest.raises(RepositoryNotFoundError, match="Repository Not Found"):
        hf_hub_download("tester/secret", "README.md", token=token, cache_dir=tmp_path)
    with pytest.raises(HfHubHTTPError, match="401|403|404"):
        api.upload_file(repo_id="tester/secret", path_or_fileobj=b"x", path_in_repo="x.txt", token=token)
    api.update_repo_settings("tester/secret", private=False)
    assert not api.model_info("tester/secret", token=token).private
    with pytest.raises(HfHubHTTPError, match="401|403"):
        api.upload_file(repo_id="tester/secret", path_or_fileobj=b"x", path_in_repo="x.txt", token=token)
    with pytest.raises(HfHubHTTPError, match="401"):
        api.model_info("tester/secret", token="hf_wrong")


def test_what_the_hub_refuses(hub, repo, folder):
    with pytest.raises(EntryNotFoundError, match="Entry Not Found"):
        hf_hub_download("tester/thing", "nothing.json")
    with pytest.raises(RepositoryNotFoundError, match="Repository Not Found"):
        hf_hub_download("nobody", "config.json")
    with pytest.raises(HfHubHTTPError, match="already created"):
        repo.create_repo("tester/thing")
    (folder / "README.md").write_text("---\nlicense: none-such\n---\n")
    with pytest.raises(ValueError, match="license.* with value .*none-such"):
        validate_card(ModelCard.load(folder / "README.md"))
    with pytest.raises(ValueError, match="Invalid metadata in README.md(.|\n)*none-such"):
        repo.upload_folder(repo_id="tester/thing", folder_path=folder)
    assert b"mit" in hub.files("tester/thing")["README.md"]


def test_interrupted_transfers(hub, repo, folder, tmp_path):
    hub.fail_next("GET", "weights", how="truncate")
    if not TRUNCATED_IS_TRIED_AGAIN:
        with pytest.raises(OSError, match="IncompleteRead"):
            hf_hub_download("tester/thing", "weights.safetensors", cache_dir=tmp_path / "cache")
    path = hf_hub_download("tester/thing", "weights.safetensors", cache_dir=tmp_path / "cache")
    with open(path, "rb") as handle:
        assert handle.read() == WEIGHTS
    assert [request.status for request in hub.sent("GET", "weights")] == [0, 200]
    url = hf_hub_url("tester/thing", "weights.safetensors")
    part = get_session().get(url, headers={"Range": "bytes=1000-1999"})
    assert (part.status_code, part.content) == (206, WEIGHTS[1000:2000])
    assert part.headers["Content-Range"] == "bytes 1000-1999/3000"
    (folder / "weights.safetensors").write_bytes(WEIGHTS + b"more")
    hub.fail_next("PUT", "lfs-objects", how="403")
    before = repo.model_info("tester/thing").sha
    with pytest.raises(RuntimeError, match="Error while uploading 'weights.safetensors'"):
        repo.upload_folder(repo_id="tester/thing", folder_path=folder)
    hub.fail_next("POST", "/commit/main", how="lost")
    with pytest.raises(CONNECTION_LOST, match=LOST):
        repo.upload_folder(repo_id="tester/thing", folder_path=folder)
    assert repo.model_info("tester/thing").sha != before
    assert hub.files("tester/thing")["weights.safetensors"] == WEIGHTS + b"more"
    with pytest.raises(ValueError, match="`how` must be one of .*, got 'burn'"):
        hub.fail_next("GET", "x", how="burn")


def test_a_fresh_process_reaches_this_machine_only(hub_process):
    code = """
from huggingface_hub import HfApi
name = HfApi().whoami()["name"]
def fails(function, *arguments):
    try:
        function(*arguments)
    except AssertionError:
        return True
refused = [fails(socket.create_connection, ("192.0.2.1", 80))]
go_offline()
refused.append(fails(HfApi().model_info, "tester/none"))
print(json.dumps([name, refused, os.path.isdir("diffusers_ext")]))
"""
    assert hub_process(code) == ["tester", [True, True], True]
    assert hub_process(code, package=False) == ["tester", [True, True], False]


def test_unknown_requests_are_kept():
    with HubServer() as server:
        with pytest.raises(HfHubHTTPError, match="501"):
            list(HfApi(endpoint=server.endpoint).list_spaces())
        assert [request.path for request in server.unknown] == ["/api/spaces"]
    with pytest.raises(CONNECTION_REFUSED, match="refused"):
        HfApi(endpoint=server.endpoint).whoami()
