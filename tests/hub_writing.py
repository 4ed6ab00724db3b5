"""Requests to the local Hub that change something."""

from __future__ import annotations

import base64
from typing import Any

from tests.hub_routes import API, PAGE, Answer, Call, json_answer, route
from tests.hub_storage import Commit, HubError, Repository, StoredFile


@route("POST", "/api/repos/create")
def _create(call: Call) -> Answer:
    wish = call.json
    owner = wish.get("organization") or call.user
    call.writing_in(owner)
    name = f"{owner}/{wish['name']}"
    prefix = prefix_of(wish)
    url = {"name": name, "url": f"{call.endpoint}/{prefix}{name}"}
    if prefix + name in call.repos:
        return json_answer({"error": "You already created this repo", **url}, 409)
    private = wish.get("visibility") == "private" or bool(wish.get("private"))
    call.repos[prefix + name] = Repository(name, "datasets" if prefix else "models", private)
    return json_answer(url)


@route("DELETE", "/api/repos/delete")
def _delete(call: Call) -> Answer:
    name = f"{call.json.get('organization') or call.user}/{call.json['name']}"
    call.repository(prefix_of(call.json), name, write=True)
    del call.repos[prefix_of(call.json) + name]
    return json_answer({})


def prefix_of(wish: dict[str, Any]) -> str:
    if wish.get("type") not in (None, "model", "dataset"):
        raise HubError(501, f"No {wish['type']} is kept here.")
    return "datasets/" if wish.get("type") == "dataset" else ""


@route("PUT", API + "/settings")
def _settings(call: Call, prefix: str, name: str) -> Answer:
    repo = call.repository(prefix, name, write=True)
    repo.private = call.json.get("private", call.json.get("visibility") == "private")
    return json_answer({"private": repo.private})


@route("POST", API + "/preupload/(?P<revision>[^/]+)")
def _preupload(call: Call, prefix: str, name: str, revision: str) -> Answer:
    repo = call.repository(prefix, name, write=not call.asks("create_pr"))
    there = repo.at(revision).files
    files = []
    for wish in call.json["files"]:
        path, sample = wish["path"], base64.b64decode(wish["sample"])
        mode = repo.upload_mode(path, sample, wish["size"])
        line = {"path": path, "uploadMode": mode, "shouldIgnore": False}
        files.append({**line, "oid": there[path].etag if path in there else None})
    return json_answer({"files": files, "commitOid": repo.at(revision).sha})


@route("POST", PAGE + r"\.git/info/lfs/objects/batch")
def _lfs_batch(call: Call, prefix: str, name: str) -> Answer:
    repo = call.repository(prefix, name)
    call.writing_in(call.user or "")
    objects = []
    for wish in call.json["objects"]:
        line = {"oid": wish["oid"], "size": wish["size"]}
        if wish["oid"] not in repo.objects:
            address = f"{call.endpoint}/{prefix}{name}.git/lfs-objects/{wish['oid']}"
            upload, verify = ({"href": address, "header": {}}, {"href": f"{address}/verify"})
            line["actions"] = {"upload": upload, "verify": {**verify, "header": {}}}
        objects.append(line)
    return json_answer({"transfer": "basic", "objects": objects})


# The address itself is the permission, as with storage that signs its addresses.
@route("PUT", PAGE + r"\.git/lfs-objects/(?P<oid>[0-9a-f]{64})")
def _lfs_put(call: Call, prefix: str, name: str, oid: str) -> Answer:
    if StoredFile(call.body, lfs=True).sha256 != oid:
        raise HubError(400, "The content does not have that SHA-256.")
    call.repos[prefix + name].objects[oid] = call.body
    return Answer(b"")


@route("POST", PAGE + r"\.git/lfs-objects/(?P<oid>[0-9a-f]{64})/verify")
def _lfs_verify(call: Call, prefix: str, name: str, oid: str) -> Answer:
    found = call.repository(prefix, name).objects.get(oid)
    if found is None or len(found) != call.json["size"]:
        raise HubError(404, "Object does not exist.")
    return json_answer({})


@route("POST", API + "/commit/(?P<revision>[^/]+)")
def _commit(call: Call, prefix: str, name: str, revision: str) -> Answer:
    create_pr = call.asks("create_pr")
    repo = call.repository(prefix, name, write=not create_pr)
    call.writing_in(call.user or "")
    commit, ref = repo.commit(revision, call.body.splitlines(), create_pr)
    page = f"{call.endpoint}/{prefix}{name}"
    answer = {"success": True, "commitOid": commit.sha, "commitUrl": f"{page}/commit/{commit.sha}"}
    if create_pr:
        answer["pullRequestUrl"] = f"{page}/discussions/{ref.rsplit('/', 1)[1]}"
    return json_answer(answer)


@route("POST", API + "/branch/(?P<branch>[^/]+)")
def _branch(call: Call, prefix: str, name: str, branch: str) -> Answer:
    repo = call.repository(prefix, name, write=True)
    if branch.startswith("refs/"):
        raise HubError(400, f"Invalid reference for a branch: {branch}")
    return _new_ref(repo, f"refs/heads/{branch}", repo.at(call.json.get("startingPoint", "main")))


@route("POST", API + "/tag/(?P<revision>[^/]+)")
def _tag(call: Call, prefix: str, name: str, revision: str) -> Answer:
    repo = call.repository(prefix, name, write=True)
    return _new_ref(repo, f"refs/tags/{call.json['tag']}", repo.at(revision))


def _new_ref(repo: Repository, ref: str, commit: Commit) -> Answer:
    if ref in repo.refs:
        return json_answer({"error": f"Reference already exists: {ref}"}, 409)
    repo.refs[ref] = commit
    return json_answer({})


@route("DELETE", API + "/(?P<sort>branch|tag)/(?P<short>[^/]+)")
def _delete_ref(call: Call, prefix: str, name: str, sort: str, short: str) -> Answer:
    repo = call.repository(prefix, name, write=True)
    ref = f"refs/{'heads' if sort == 'branch' else 'tags'}/{short}"
    if ref == "refs/heads/main" or repo.refs.pop(ref, None) is None:
        raise HubError(404, f"{ref} cannot be deleted.", "RevisionNotFound")
    return json_answer({})
