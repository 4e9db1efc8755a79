"""A ModelScope hub on loopback, as far as its SDK asks it when a model is published and downloaded.

Paths, envelopes and field names are those that modelscope_hub 0.5 sends and reads (`_legacy_api.py`,
`_openapi.py`). Commits are whole or refused, as on the hub.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlparse

from loopback_http import answering

TOKEN = "ms-loopback"


@dataclass
class Repository:
    """A model: its commits, each a whole tree, and what names them."""

    visibility: int
    commits: list[dict[str, bytes]] = field(default_factory=lambda: [{".gitattributes": b""}])
    tags: dict[str, int] = field(default_factory=dict)

    def tree(self, revision: str) -> dict[str, bytes] | None:
        """Files at a branch or tag."""
        number = len(self.commits) - 1 if revision == "master" else self.tags.get(revision)
        return None if number is None else self.commits[number]


class Hub:
    """The state, and what came in."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.uploads: list[str] = []
        """SHA-256 of every blob that came in, in order."""
        self.lock = threading.Lock()

    def running(self) -> AbstractContextManager[str]:
        """`host:port` while it runs."""
        return answering(_Handler, hub=self)


class _Handler(BaseHTTPRequestHandler):
    hub: ClassVar[Hub]
    protocol_version = "HTTP/1.1"

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._say(401, {"Code": 10010205001, "Message": "user not logged in", "Success": False})
            return
        with self.hub.lock:
            self._answer(body)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _answer(self, body: bytes) -> None:
        url = urlparse(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        parts = url.path.strip("/").split("/")
        match self.command, parts:
            case "GET", ["openapi", "v1", "users", "me"]:
                self._say(200, {"success": True, "data": {"username": "org"}})
            case "GET", ["openapi", "v1", "models", owner, name]:
                found = self.hub.repositories.get(f"{owner}/{name}")
                status = 404 if found is None else 200
                self._say(status, {"success": found is not None, "data": {"owner": owner, "name": name}})
            case "POST", ["api", "v1", "models"]:
                self._create(json.loads(body))
            case "GET", ["api", "v1", "models", owner, name, *rest]:
                self._read(f"{owner}/{name}", rest, query)
            case "POST", ["api", "v1", "models", owner, name, "repo", "tag"]:
                wanted = json.loads(body)
                repository = self.hub.repositories[f"{owner}/{name}"]
                repository.tags[wanted["TagName"]] = len(repository.commits) - 1
                self._data({})
            case "POST", ["api", "v1", "repos", "models", owner, name, "info", "lfs", "objects", "batch"]:
                self._batch(json.loads(body)["objects"])
            case "POST", ["api", "v1", "repos", "models", owner, name, "commit", "master"]:
                self._commit(self.hub.repositories[f"{owner}/{name}"], json.loads(body)["actions"])
            case "PUT", ["blobs", oid] if hashlib.sha256(body).hexdigest() == oid:
                self.hub.blobs[oid] = body
                self.hub.uploads.append(oid)
                self._say(200, {"Code": 200, "Data": {}})
            case _:
                self._say(404, {"Code": 404, "Message": f"no {self.command} {self.path}", "Success": False})

    def _create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['Path']}/{wanted['Name']}"
        if name in self.hub.repositories:
            self._say(400, {"Code": 10010101001, "Message": "model already exists", "Success": False})
            return
        self.hub.repositories[name] = Repository(wanted["Visibility"])
        self._data({"Name": wanted["Name"]})

    def _read(self, name: str, rest: list[str], query: dict[str, str]) -> None:
        repository = self.hub.repositories.get(name)
        tree = repository.tree(query.get("Revision", "master")) if repository else None
        if repository is None or tree is None:
            self._say(404, {"Code": 10010205001, "Message": "模型不存在", "Success": False})
        elif rest == ["repo", "files"]:
            files = [
                {"Path": path, "Name": path.rpartition("/")[2], "Type": "blob", "Size": len(data),
                 "Sha256": hashlib.sha256(data).hexdigest()}
                for path, data in sorted(tree.items())
            ]  # fmt: skip
            folders = {path.rpartition("/")[0] for path in tree if "/" in path}
            self._data(
                {"Files": files + [{"Path": f, "Name": f, "Type": "tree", "Size": 0} for f in folders]}
            )
        elif rest == ["revisions"]:
            tags = [{"Revision": tag} for tag in repository.tags]
            self._data({"RevisionMap": {"Branches": [{"Revision": "master"}], "Tags": tags}})
        elif rest == ["repo"] and query["FilePath"] in tree:
            self._send(tree[query["FilePath"]])
        else:
            self._say(404, {"Code": 404, "Message": "no such file", "Success": False})

    def _batch(self, objects: list[dict[str, Any]]) -> None:
        place = f"http://{self.headers['Host']}/blobs"
        missing = [one for one in objects if one["oid"] not in self.hub.blobs]
        self._data(
            {"objects": [one | {"actions": {"upload": {"href": f"{place}/{one['oid']}"}}} for one in missing]}
        )

    def _commit(self, repository: Repository, actions: list[dict[str, Any]]) -> None:
        tree = dict(repository.commits[-1])
        for action in actions:
            if action["action"] == "delete":
                tree.pop(action["path"], None)
            elif action["type"] == "normal":
                tree[action["path"]] = base64.b64decode(action["content"])
            elif action["sha256"] in self.hub.blobs:
                tree[action["path"]] = self.hub.blobs[action["sha256"]]
            else:
                self._say(400, {"Code": 400, "Message": f"no blob {action['sha256']}", "Success": False})
                return
        repository.commits.append(tree)
        self._data({"CommitId": f"{len(repository.commits):040x}"})

    def _data(self, data: dict[str, Any]) -> None:
        self._say(200, {"Code": 200, "Success": True, "Data": data})

    def _say(self, status: int, document: dict[str, Any]) -> None:
        self._send(json.dumps(document).encode(), status, "application/json")

    def _send(self, data: bytes, status: int = 200, kind: str = "application/octet-stream") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else data)

    def log_message(self, *_: object) -> None:
        pass
