"""Requests to the local Hub that only ask."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import parse_qs

from tests.hub_metadata import metadata_errors
from tests.hub_routes import API, PAGE, Answer, Call, json_answer, route
from tests.hub_storage import Commit, HubError, Repository


@route("GET", "/api/whoami-v2")
def _who(call: Call) -> Answer:
    if call.user is None:
        raise HubError(401, "Invalid username or password.")
    access = {"accessToken": {"displayName": "test", "role": "write"}}
    return json_answer({"type": "user", "name": call.user, "orgs": [], "auth": access})


@route("POST", "/api/validate-yaml")
def _validate(call: Call) -> Answer:
    errors = metadata_errors(call.json["content"], f"{call.json['repoType']}s")
    lines = {"errors": [{"message": error} for error in errors], "warnings": []}
    return json_answer(lines, 400 if errors else 200)


@route("GET", "/api/(?P<kind>model|dataset)s")
def _list(call: Call, prefix: str) -> Answer:
    found = []
    for key, repo in call.repos.items():
        if key.startswith("datasets/") != bool(prefix) or not call.may_read(repo):
            continue
        information = _information(repo, repo.at("main"), blobs=False)
        wanted = set(call.parameters.get("filter", []))
        author, search = (call.parameters.get(key, [""])[0] for key in ("author", "search"))
        if wanted <= set(information["tags"]) and author in ("", information["author"]) and search in repo.repo_id:
            found.append(information)
    return json_answer(found)


@route("GET", API + "(/revision/(?P<revision>[^/]+))?")
def _info(call: Call, prefix: str, name: str, revision: str) -> Answer:
    repo = call.repository(prefix, name)
    return json_answer(_information(repo, repo.at(revision or "main"), call.asks("blobs")))


def _information(repo: Repository, commit: Commit, blobs: bool) -> dict[str, Any]:
    header = commit.header()
    tags = [header.get("library_name"), *(header.get("tags") or [])]
    if base := header.get("base_model"):
        relation = header.get("base_model_relation")
        tags += [f"base_model:{base}", f"base_model:{relation}:{base}"]
    if "license" in header:
        tags.append(f"license:{header['license']}")
    return {
        "_id": commit.sha[:24],
        "id": repo.repo_id,
        "author": repo.repo_id.split("/")[0],
        "sha": commit.sha,
        "createdAt": commit.history()[-1].date,
        "lastModified": commit.date,
        "private": repo.private,
        "gated": False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [tag for tag in dict.fromkeys(tags) if tag],
        "cardData": header,
        **{key: header[key] for key in ("pipeline_tag", "library_name") if key in header},
        "siblings": [stored.sibling(p, blobs) for p, stored in sorted(commit.files.items())],
    }


@route("GET", API + "/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?")
def _tree(call: Call, prefix: str, name: str, revision: str, folder: str) -> Answer:
    commit = call.repository(prefix, name).at(revision)
    entries = commit.entries(folder.rstrip("/"), call.asks("recursive"))
    if folder and not entries:
        raise HubError(404, f"{folder} does not exist on {revision!r}", "EntryNotFound")
    return json_answer(entries)


@route("POST", API + "/paths-info/(?P<revision>[^/]+)")
def _paths_info(call: Call, prefix: str, name: str, revision: str) -> Answer:
    commit = call.repository(prefix, name).at(revision)
    wanted = {path.strip("/") for path in parse_qs(call.body.decode()).get("paths", [])}
    return json_answer([e for e in commit.entries("", recursive=True) if e["path"] in wanted])


@route("GET", API + "/commits/(?P<revision>[^/]+)")
def _commits(call: Call, prefix: str, name: str, revision: str) -> Answer:
    history = call.repository(prefix, name).at(revision).history()
    lines = [
        {"id": commit.sha, "title": commit.title, "message": "", "date": commit.date, "authors": []}
        for commit in history
    ]
    return json_answer(lines)


@route("GET", API + "/refs")
def _refs(call: Call, prefix: str, name: str) -> Answer:
    groups = {"heads": [], "tags": [], "pr": []}
    for ref, commit in call.repository(prefix, name).refs.items():
        _, group, short = ref.split("/", 2)
        groups[group].append({"name": short, "ref": ref, "targetCommit": commit.sha})
    names = {"branches": groups["heads"], "tags": groups["tags"], "converts": []}
    if call.asks("include_prs"):
        names["pullRequests"] = groups["pr"]
    return json_answer(names)


@route("GET HEAD", PAGE + "/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
def _resolve(call: Call, prefix: str, name: str, revision: str, path: str) -> Answer:
    commit = call.repository(prefix, name).at(revision)
    stored = commit.files.get(path)
    if stored is None:
        at = {"X-Repo-Commit": commit.sha}
        raise HubError(404, f"{path} does not exist on {revision!r}", "EntryNotFound", **at)
    headers = {
        "X-Repo-Commit": commit.sha,
        "ETag": f'"{stored.etag}"',
        "Accept-Ranges": "bytes",
        "Content-Type": "application/octet-stream",
    }
    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", call.headers.get("Range", ""))
    if not wanted:
        return Answer(stored.content, 200, headers)
    size = len(stored.content)
    first, last = int(wanted[1]), min(int(wanted[2] or size - 1), size - 1)
    if first >= size:
        return Answer(b"", 416, {**headers, "Content-Range": f"bytes */{size}"})
    headers["Content-Range"] = f"bytes {first}-{last}/{size}"
    return Answer(stored.content[first : last + 1], 206, headers)


@route("GET", "/api/(models|datasets)/[^/]+")
@route("GET HEAD", "/(datasets/)?[^/]+/resolve/.+")
def _without_owner(call: Call) -> Answer:
    return call.repository("", "/")
