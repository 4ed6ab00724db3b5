from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest
from diffusers import UNet2DConditionModel
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

import diffusers_ext
from diffusers_ext.hub import Licence, Measured
from diffusers_ext.hub import push as hub_module
from diffusers_ext.hub.card import make_card
from diffusers_ext.hub.push import PushWithCard, make_repository, push_folder, split_arguments
from tests.tiny_models import sd_unet

REPO = "tester/seven"
FACTS = {
    "base_model": "somebody/base",
    "license": "mit",
    "trained_on": "Three prompts.",
    "concept": "seven",
    "anchor_concept": "",
    "preserved_concepts": [],
    "pipeline": "CogVideoXPipeline",
    "rank": 4,
    "parameters": 1000,
}
ERASER = partial(make_card, "eraser", **FACTS)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Files as of an artifact: one large, one small, one below a folder."""
    folder = tmp_path / "artifact"
    (folder / "plots").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 8)
    (folder / "config.json").write_text("{}\n")
    (folder / "plots" / "curve.txt").write_text("1 2 3\n")
    return folder


FILES = ["README.md", "config.json", "model.safetensors", "plots/curve.txt"]


def test_a_folder_and_its_card_arrive_in_one_commit(hub, folder):
    address = push_folder(folder, REPO, ERASER())
    assert sorted(hub.files(REPO)) == FILES
    assert hub.files(REPO)["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    commits = hub.sent("POST", "/commit/")
    assert len(commits) == 1
    newest = HfApi().list_repo_commits(REPO)[0]
    assert newest.commit_id in address
    assert newest.title == "Upload with diffusers_ext"
    card = ModelCard(hub.files(REPO)["README.md"].decode())
    assert (card.data.base_model, card.data.license) == ("somebody/base", "mit")
    assert REPO in card.text
    assert not (folder / "README.md").exists()


def test_a_short_name_belongs_to_the_user(hub, folder):
    push_folder(folder, "seven", ERASER(), commit_message="Add it")
    assert REPO in ModelCard(hub.files(REPO)["README.md"].decode()).text
    assert HfApi().list_repo_commits(REPO)[0].title == "Add it"


def test_ignored_files_stay_here(hub, folder):
    for name in (".git/config", "checkpoint-1/state.bin", "plots/README.md"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("words")
    push_folder(folder, REPO, ERASER(), ignore_patterns=["checkpoint-*"])
    assert sorted(hub.files(REPO)) == [*FILES[:3], "plots/README.md", FILES[3]]


def test_a_branch_is_made_and_main_stays(hub, folder):
    push_folder(folder, REPO, ERASER())
    before = hub.files(REPO)
    (folder / "config.json").write_text('{"a": 1}\n')
    for _ in range(2):
        push_folder(folder, REPO, ERASER(), revision="next")
    assert hub.files(REPO, revision="next")["config.json"] == b'{"a": 1}\n'
    assert hub.files(REPO) == before


def test_a_pull_request_changes_nothing_by_itself(hub, folder):
    push_folder(folder, REPO, ERASER())
    (folder / "config.json").write_text('{"a": 1}\n')
    address = push_folder(folder, REPO, ERASER(), create_pr=True)
    assert address.endswith(f"{REPO}/discussions/1")
    assert hub.files(REPO)["config.json"] == b"{}\n"
    assert hub.files(REPO, revision="refs/pr/1")["config.json"] == b'{"a": 1}\n'
    (folder / "config.json").write_text('{"a": 2}\n')
    push_folder(folder, REPO, ERASER(), revision="refs/pr/1")
    assert hub.files(REPO, revision="refs/pr/1")["config.json"] == b'{"a": 2}\n'
    with pytest.raises(RevisionNotFoundError):
        push_folder(folder, REPO, ERASER(), revision="absent", create_pr=True)


def test_a_private_repository(hub, folder):
    push_folder(folder, REPO, ERASER(), private=True, token="hf_test")
    assert HfApi(token="hf_test").model_info(REPO).private
    with pytest.raises(RepositoryNotFoundError):
        HfApi(token="hf_stranger").model_info(REPO)


def test_a_subfolder_has_its_card_at_the_root(hub, folder):
    push_folder(folder, REPO, ERASER(), subfolder="erasers/seven/")
    assert sorted(hub.files(REPO)) == ["README.md", *(f"erasers/seven/{n}" for n in FILES[1:])]
    assert 'subfolder="erasers/seven' in hub.files(REPO)["README.md"].decode()


def test_the_words_of_the_owner_stay(hub, folder):
    push_folder(folder, REPO, ERASER())
    api = HfApi()
    text = hub.files(REPO)["README.md"].decode()
    mine = text.replace("license: mit", "license: apache-2.0") + "\nAsk me about it.\n"
    api.upload_file(path_or_fileobj=mine.encode(), path_in_repo="README.md", repo_id=REPO)
    card = make_card("eraser", **{**FACTS, "rank": 5})
    push_folder(folder, REPO, card)
    after = hub.files(REPO)["README.md"].decode()
    assert "Ask me about it." in after
    assert ModelCard(after).data.license == "apache-2.0"
    assert after.replace("rank 5", "rank 4") != after


def test_words_written_into_the_folder_count_where_the_hub_has_none(hub, folder):
    (folder / "README.md").write_text("---\nlanguage: en\n---\n\nMy own words.\n")
    push_folder(folder, REPO, ERASER())
    after = hub.files(REPO)["README.md"].decode()
    assert "My own words." in after
    assert ModelCard(after).data.language == "en"
    (folder / "README.md").write_text("Other words.")
    push_folder(folder, REPO, ERASER())
    assert hub.files(REPO)["README.md"].decode() == after


@pytest.mark.parametrize(
    ("method", "path", "how"), [("PUT", "", "400"), ("POST", "/commit/", "drop"), ("POST", "/commit/", "500")]
)
def test_an_interrupted_upload_shows_nothing_and_goes_on(hub, folder, method, path, how):
    push_folder(folder, REPO, ERASER())
    before = hub.files(REPO)
    (folder / "model.safetensors").write_bytes(b"new" * 1000)
    (folder / "config.json").write_text('{"a": 1}\n')
    hub.fail_next(method, path, times=20, how=how)
    with pytest.raises(Exception, match=r"."):  # noqa: PT011, B017  whatever the client raises
        push_folder(folder, REPO, ERASER())
    assert hub.files(REPO) == before
    hub._failures.clear()
    sent = len(hub.sent("PUT", ""))
    push_folder(folder, REPO, ERASER())
    assert hub.files(REPO)["model.safetensors"] == b"new" * 1000
    assert hub.files(REPO)["config.json"] == b'{"a": 1}\n'
    assert len(hub.sent("PUT", "")) - sent == (1 if method == "PUT" else 0)


@pytest.mark.parametrize("problem", ["folder", "empty", "card", "token", "login", "header"])
def test_nothing_reaches_the_hub_before_everything_is_right(hub, folder, tmp_path, problem):
    def broken(repo_id: str) -> ModelCard:
        raise ValueError("`rank` must be given.")

    (tmp_path / "empty").mkdir()
    source, card, message, token = {
        "folder": (tmp_path / "absent", ERASER(), "`folder` must be a folder, got .*absent", None),
        "empty": (tmp_path / "empty", ERASER(), "`folder` must hold files to upload, got none", None),
        "card": (folder, broken, "`rank` must be given", None),
        "token": (
            folder, make_card("eraser", **FACTS, settings={"key": "hf_test"}),
            "The card must not hold the token", "hf_test",
        ),
        "login": (
            folder, make_card("eraser", **FACTS, settings={"key": "hf_test"}),
            "The card must not hold the token", None,
        ),
        "header": (folder, lambda _: ModelCard("---\nlicense: 7\n---\n"), ".", None),
    }[problem]  # fmt: skip
    with pytest.raises(ValueError, match=message):
        push_folder(source, REPO, card, token=token)
    assert not hub.repos


def test_who_may_not_write_is_told(hub, folder):
    push_folder(folder, REPO, ERASER())
    before = hub.files(REPO)
    with pytest.raises(HfHubHTTPError, match="403"):
        push_folder(folder, REPO, ERASER(), token="hf_stranger")
    assert hub.files(REPO) == before


def test_a_repository_can_be_made_before_a_long_run(hub):
    assert make_repository("seven", private=True) == REPO
    assert hub.repos[REPO].private
    assert make_repository(REPO) == REPO
    with pytest.raises(HfHubHTTPError, match="401"):
        make_repository("seven", token="hf_unknown")


def test_a_missing_fact_is_named():
    for name in ("base_model", "trained_on", "concept", "preserved_concepts"):
        with pytest.raises(ValueError, match=f"`{name}` must be given for the card, got None"):
            make_card("eraser", **{**FACTS, name: None})


def test_wrong_facts_are_found_before_the_upload():
    with pytest.raises(ValueError, match="of kind 'eraser' must have .* got .'colour'"):
        make_card("eraser", **FACTS, colour="red")
    with pytest.raises(ValueError, match="`kind` must be one of"):
        make_card("sculpture", **FACTS)


def test_results_settings_and_the_version_are_in_the_card():
    measured = Measured("30 prompts", "share of clips that show a seven", 0.25)
    card = make_card(
        "eraser", **{**FACTS, "base_model": str(Path(__file__).parent)},
        settings={"strength": 0.5}, results=[measured],
    )(REPO)  # fmt: skip
    assert card.data.base_model is None
    (result,) = card.data.eval_results
    assert result.metric_value == 0.25
    assert "| strength | 0.5 |" in card.text
    assert diffusers_ext.__version__ in card.text
    assert str(Path(__file__).parent.parent) not in str(card)
    given = make_card("eraser", **{**FACTS, "license": Licence("other", "own", "https://a.b")})
    assert given(REPO).data.license_name == "own"


def test_arguments_are_told_apart():
    hub, facts = split_arguments({"token": "t", "license": "mit", "revision": None})
    assert (hub, facts) == ({"token": "t", "revision": None}, {"license": "mit"})


def test_no_upload_goes_round_the_card():
    doors = re.compile(
        r"(?:upload_folder|upload_file|upload_large_folder|create_commit|create_repo|"
        r"preupload_lfs_files|CommitScheduler|super\(\)\.push_to_hub)(?=\()"
    )
    root = Path(hub_module.__file__).parents[2]
    sources = [*root.glob("diffusers_ext/**/*.py"), *root.glob("training/**/*.py")]
    found = {path: set(doors.findall(path.read_text(encoding="utf-8"))) for path in sources}
    assert {path.relative_to(root).as_posix(): names for path, names in found.items() if names} == {
        "diffusers_ext/hub/push.py": {"create_commit", "create_repo", "preupload_lfs_files"}
    }


def test_an_upload_deletes_them_in_its_own_commit_and_folder(hub, tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    for folder, names in (
        (old, ["model-00001-of-00001.safetensors", "model.safetensors.index.json", "7.bin", "note"]),
        (new, ["model.safetensors", "config.json"]),
    ):
        folder.mkdir()
        for name in names:
            (folder / name).write_text(f'{{"name": "{folder / name}"}}')
    where = {"revision": "next", "private": True}
    push_folder(old, REPO, ERASER(), **where)
    push_folder(old, REPO, ERASER(), subfolder="a[b]", **where)
    before = hub.files(REPO, revision="next")
    pushed = {"subfolder": "a[b]", "delete_patterns": ["*.bin"], **where}
    address = push_folder(new, REPO, ERASER(), create_pr=True, **pushed)
    assert hub.files(REPO, revision="next") == before
    files = hub.files(REPO, revision=f"refs/pr/{address[-1]}")
    kept = {name for name in before if "[" not in name}
    assert files.keys() == kept | {f"a[b]/{n}" for n in ("config.json", "model.safetensors", "note")}
    assert files["a[b]/config.json"] == b'{"name": "config.json"}'
    push_folder(new, REPO, ERASER(), **pushed)
    assert hub.files(REPO, revision="next") == files
    assert "/commit/" in push_folder(new, REPO, ERASER(), create_pr=True, **pushed)
    assert not hub.files(REPO)


class Described(PushWithCard, UNet2DConditionModel):
    """A model of diffusers with a card."""

    def _card(self, *, token, **facts):
        return make_card("eraser", token=token, **{**FACTS, "trained_on": None, **facts})


class Undescribed(PushWithCard, UNet2DConditionModel):
    """A model without a card."""


@pytest.fixture(scope="module")
def model() -> Described:
    return Described.from_config(sd_unet().model.config)


def test_both_ways_of_an_upload(hub, model, tmp_path):
    (tmp_path / "named").mkdir()
    (tmp_path / "named" / "diary.txt").write_text("mine")
    model.save_pretrained(
        tmp_path / "named", variant="fp16", push_to_hub=True, is_main_process=True, trained_on="Words.",
        private=True,
    )  # fmt: skip
    names = ["README.md", "config.json", "diffusion_pytorch_model.fp16.safetensors"]
    assert sorted(hub.files("tester/named")) == names
    assert "tester/named" in ModelCard(hub.files("tester/named")["README.md"].decode()).text
    assert hub.repos["tester/named"].private
    address = model.push_to_hub("tester/other", max_shard_size="20KB", trained_on="Words.")
    assert "tester/other/commit/" in address
    assert "diffusion_pytorch_model.safetensors.index.json" in hub.files("tester/other")
    loaded = UNet2DConditionModel.from_pretrained("tester/named", variant="fp16")
    weights = model.state_dict()
    assert all(value.equal(weights[name]) for name, value in loaded.state_dict().items())


def test_nothing_is_written_without_a_card(hub, model, tmp_path):
    with pytest.raises(ValueError, match="`trained_on` must be given"):
        model.save_pretrained(tmp_path / "out", push_to_hub=True)
    with pytest.raises(TypeError, match="Undescribed must define `_card`"):
        Undescribed.from_config(sd_unet().model.config).push_to_hub("tester/out")
    assert not (tmp_path / "out").exists()
    assert not hub.repos


def test_saving_is_that_of_diffusers(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert "diffusion_pytorch_model.safetensors.index.json" in names
