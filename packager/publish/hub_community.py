"""The loopback hub's answers about people: accounts, settings, discussions, pull requests, collections."""

from __future__ import annotations

import re
from typing import Any, Protocol

from packager.publish.hub_accounts import Accounts
from packager.publish.hub_http import Reply, Request
from packager.publish.hub_store import MAIN, Discussion, HubError, HubStore, now


class HubParts(Protocol):
    """What these answers need of the hub."""

    store: HubStore
    accounts: Accounts

    @property
    def url(self) -> str:
        """Its address."""


def whoami(_: HubParts, request: Request) -> Reply:
    """GET /api/whoami-v2."""
    return Reply(document=request.account.whoami())


def exchange_token(hub: HubParts, request: Request) -> Reply:
    """POST /oauth/token: an identity token of a CI job for a token of the hub."""
    return Reply(document=hub.accounts.exchange(request.json(), hub.url))


def check_access(hub: HubParts, request: Request) -> Reply:
    """GET /api/models/REPO/auth-check and .../auth-check/write."""
    repo = request.parts["repo"]
    hub.store.state(repo)
    if request.parts.get("write") and not request.account.may_write(repo):
        raise HubError(403, f"this token may not write to {repo}")
    return Reply(document={})


def change_settings(hub: HubParts, request: Request) -> Reply:
    """PUT /api/models/REPO/settings: gated, visibility."""
    asked = request.json()
    if asked.get("gated") not in (None, False, "auto", "manual"):
        raise HubError(400, "gated is auto, manual or false")
    private = None if "visibility" not in asked else asked["visibility"] == "private"
    hub.store.change_settings(request.parts["repo"], gated=asked.get("gated"), private=private)
    return Reply(document={"gated": asked.get("gated")})


def list_storage(hub: HubParts, request: Request) -> Reply:
    """GET /api/settings/repositories and /api/organizations/ORG/settings/repositories."""
    owner = request.parts.get("org") or request.account.name
    found = []
    for repo in hub.store.repositories():
        if repo.split("/")[0] == owner:
            state = hub.store.state(repo)
            size = sum(file.size for file in hub.store.commit(repo, MAIN).tree.values())
            visibility = "private" if state.private else "public"
            found.append({"id": repo, "type": "model", "updatedAt": now(), "visibility": visibility,
                          "storage": size, "storagePercent": 0})  # fmt: skip
    return Reply(document=found)


# ---- discussions and pull requests --------------------------------------------------------------------


def list_discussions(hub: HubParts, request: Request) -> Reply:
    """GET /api/models/REPO/discussions: newest first, ten a page."""
    repo = request.parts["repo"]
    found = list(reversed(hub.store.state(repo).discussions))
    kind, status = request.query.get("type", ["all"])[0], request.query.get("status", ["all"])[0]
    if kind != "all":
        found = [d for d in found if d.is_pull_request == (kind == "pull_request")]
    if status != "all":
        found = [d for d in found if (d.status in ("open", "draft")) == (status == "open")]
    start = 10 * int(request.query.get("p", ["0"])[0])
    page = [_entry(repo, d) for d in found[start : start + 10]]
    return Reply(document={"count": len(found), "start": start, "discussions": page})


def open_discussion(hub: HubParts, request: Request) -> Reply:
    """POST /api/models/REPO/discussions."""
    asked = request.json()
    number = hub.store.open_discussion(
        request.parts["repo"],
        title=str(asked["title"]),
        description=str(asked.get("description", "")),
        pull_request=bool(asked.get("pullRequest")),
        author=request.account.name,
    )
    return Reply(document={"num": number, "pullRequest": bool(asked.get("pullRequest"))})


def read_discussion(hub: HubParts, request: Request) -> Reply:
    """GET /api/models/REPO/discussions/NUM; the description is the first comment, as on the real hub."""
    repo, number = request.parts["repo"], int(request.parts["num"])
    discussion = hub.store.discussion(repo, number)
    texts = [discussion.description, *discussion.comments]
    events = [_comment(number, at, discussion, text) for at, text in enumerate(texts) if text]
    document = _entry(repo, discussion) | {"events": events, "diff": ""}
    if discussion.is_pull_request:
        document["changes"] = {"base": MAIN, "mergeCommitId": discussion.merge_commit}
        document["filesWithConflicts"] = []
    return Reply(document=document)


def comment(hub: HubParts, request: Request) -> Reply:
    """POST /api/models/REPO/discussions/NUM/comment."""
    number, text = int(request.parts["num"]), str(request.json()["comment"])
    discussion = hub.store.add_comment(request.parts["repo"], number, text)
    return Reply(document={"newMessage": _comment(number, len(discussion.comments), discussion, text)})


def set_status(hub: HubParts, request: Request) -> Reply:
    """POST /api/models/REPO/discussions/NUM/status."""
    status = str(request.json()["status"])
    number = int(request.parts["num"])
    hub.store.set_status(request.parts["repo"], number, status)
    created = hub.store.discussion(request.parts["repo"], number).created
    event = {"id": f"{number:024x}", "type": "status-change", "createdAt": created}
    return Reply(document={"newStatus": event | {"data": {"status": status}}})


def merge(hub: HubParts, request: Request) -> Reply:
    """POST /api/models/REPO/discussions/NUM/merge."""
    oid = hub.store.merge(request.parts["repo"], int(request.parts["num"]))
    return Reply(document={"mergeCommitId": oid})


def _entry(repo: str, discussion: Discussion) -> dict[str, Any]:
    return {
        "num": discussion.num,
        "title": discussion.title,
        "author": {"name": discussion.author},
        "createdAt": discussion.created,
        "status": discussion.status,
        "repo": {"name": repo, "type": "model"},
        "isPullRequest": discussion.is_pull_request,
    }


def _comment(number: int, at: int, discussion: Discussion, text: str) -> dict[str, Any]:
    data = {"edited": False, "hidden": False, "latest": {"raw": text}}
    return {"id": f"{number:012x}{at:012x}", "type": "comment", "createdAt": discussion.created,
            "author": {"name": discussion.author}, "data": data}  # fmt: skip


# ---- collections --------------------------------------------------------------------------------------


def make_collection(hub: HubParts, request: Request) -> Reply:
    """POST /api/collections."""
    asked = request.json()
    owner, title = str(asked["namespace"]), str(asked["title"])
    if not request.account.may_write(f"{owner}/"):
        raise HubError(403, f"this token may not make collections of {owner}")
    slug = f"{owner}/{re.sub(r'[^a-z0-9]+', '-', title.lower())}-{'0' * 24}"
    if slug in hub.store.collections():
        raise HubError(409, f"{slug} is there already")
    hub.store.put_collection(slug, {"title": title, "private": bool(asked.get("private")), "items": []})
    return Reply(document=_collection(hub, slug))


def read_collection(hub: HubParts, request: Request) -> Reply:
    """GET /api/collections/OWNER/SLUG."""
    return Reply(document=_collection(hub, request.parts["slug"]))


def add_to_collection(hub: HubParts, request: Request) -> Reply:
    """POST /api/collections/OWNER/SLUG/items."""
    slug, item = request.parts["slug"], request.json()["item"]
    document = _collection(hub, slug)
    if not request.account.may_write(slug):
        raise HubError(403, f"this token may not change the collection {slug}")
    hub.store.state(str(item["id"]))
    if any(known["id"] == item["id"] for known in document["items"]):
        raise HubError(409, f"{item['id']} is in {slug} already")
    kept = hub.store.collections()[slug]
    kept["items"].append({"_id": f"{len(kept['items']):024x}", "id": item["id"], "type": item["type"]})
    hub.store.put_collection(slug, kept)
    return Reply(document=_collection(hub, slug))


def _collection(hub: HubParts, slug: str) -> dict[str, Any]:
    kept = hub.store.collections().get(slug)
    if kept is None:
        raise HubError(404, "Collection not found")
    items = [item | {"position": at} for at, item in enumerate(kept["items"])]
    return {"slug": slug, "title": kept["title"], "owner": {"name": slug.split("/")[0]}, "items": items,
            "lastUpdated": now(), "position": 0, "private": kept["private"], "theme": "green",
            "upvotes": 0}  # fmt: skip
