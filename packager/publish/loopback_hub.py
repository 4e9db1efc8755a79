"""A model hub on 127.0.0.1 that the unmodified huggingface_hub client (1.x) speaks to.

It exists to rehearse a publication and to test one under faults. It knows model repositories with commits,
branches, tags, draft pull requests and merges; uploads by git-LFS and by Xet (hf_xet writes into a store on
this disk); tree listings; downloads with redirect, ETag and byte ranges; accounts with roles and scopes,
private and gated repositories, discussions, collections. The requests and answers are those of the client's
own source (`hf_api.py`, `_commit_api.py`, `lfs.py`, `file_download.py`, `community.py`, `_oidc.py`).

    with LoopbackHub(Path("hub")) as hub:
        HfApi(endpoint=hub.url, token="anything").create_repo("org/name")

Unless accounts are named, every token is accepted and may write; a request that writes, or that reads a
private repository, needs one. With
`storage_host` the contents of LFS files come from a second address, as they do from the real hub: by links
that are signed, that expire, and that a token must not follow.
"""

from __future__ import annotations

import base64
import fnmatch
import json
import re
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote, unquote

import yaml

from packager.errors import UsageProblem
from packager.publish import hub_community as community
from packager.publish.hub_accounts import Account, Accounts
from packager.publish.hub_http import Fault, FaultHook, HubServer, Reply, Request
from packager.publish.hub_store import Commit, HubError, HubStore, TreeFile

_PAGE = 1000
_REPO = r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
_API = rf"/api/models/{_REPO}"
_REV = r"(?P<rev>[^/]+)"


class LoopbackHub:
    """A hub whose state lies under `storage`; it serves inside `with`, or from start() to stop()."""

    def __init__(
        self,
        storage: Path,
        *,
        port: int = 0,
        fault: FaultHook | None = None,
        storage_host: bool = False,
        accounts: Mapping[str, Account] | None = None,
    ) -> None:
        self.store = HubStore(storage)
        self.accounts = Accounts(accounts)
        self.fault = fault
        self.requests: list[tuple[str, str]] = []
        """Method and path of every request so far."""
        self.signature = 1
        """What links to the storage host are signed with; another number lets all earlier ones expire."""
        self._port = port
        self._storage_host = storage_host
        self._servers: list[tuple[HubServer, threading.Thread]] = []

    @property
    def url(self) -> str:
        """`http://127.0.0.1:PORT`, valid while the hub serves."""
        return f"http://127.0.0.1:{self._port_of(0)}"

    @property
    def storage_url(self) -> str:
        """Address of the storage host, valid while the hub serves and has one."""
        # Another host name: the client takes a redirect to another port for one within the hub.
        return f"http://localhost:{self._port_of(1)}"

    def _port_of(self, number: int) -> int:
        if len(self._servers) <= number:
            raise RuntimeError("the hub is not running")
        return int(self._servers[number][0].server_address[1])

    def start(self) -> None:
        """Begin to serve.

        Raises:
            UsageProblem: the port asked for is in use.
        """
        self._serve(self._port, self.answer)
        if self._storage_host:
            self._serve(0, self._answer_storage)

    def _serve(self, port: int, answer: Callable[[Request], Reply]) -> None:
        try:
            server = HubServer(port, answer, self._intercept)
        except OSError as err:
            raise UsageProblem(
                f"port {port} cannot be used: {err.strerror}", "Choose another port."
            ) from None
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        self._servers.append((server, thread))
        thread.start()

    def stop(self) -> None:
        """Stop serving and close every connection; what was committed stays on disk."""
        while self._servers:
            server, thread = self._servers.pop()
            server.shutdown()
            thread.join()
            server.close_connections()
            server.server_close()

    def __enter__(self) -> LoopbackHub:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _intercept(self, method: str, path: str) -> Fault | None:
        self.requests.append((method, path))
        return self.fault(method, path) if self.fault else None

    # ---- answers --------------------------------------------------------------------------------------

    def answer(self, request: Request) -> Reply:
        """Find the route and act. HubError becomes the hub's error answer."""
        try:
            for method, pattern, action, needs in _ROUTES:
                match = pattern.fullmatch(request.path)
                if match and (method == request.method or (method, request.method) == ("GET", "HEAD")):
                    request.parts = {k: unquote(v) for k, v in match.groupdict().items() if v is not None}
                    self._authorise(request, needs)
                    return action(self, request)
            raise HubError(404, f"no such address: {request.method} {request.path}")
        except HubError as err:
            headers = {"X-Error-Message": err.message} | ({"X-Error-Code": err.code} if err.code else {})
            return Reply(err.status, {"error": err.message}, headers)

    def _authorise(self, request: Request, needs: str) -> None:
        account = self.accounts.of(request.headers.get("authorization", ""))
        repo = request.parts.get("repo")
        private = bool(repo) and self.store.exists(str(repo)) and self.store.state(str(repo)).private
        if account is None:
            if needs or private:
                raise HubError(401, "Invalid username or password.", "RepoNotFound" if repo else "")
            request.account = Account("", role="read")
            return
        request.account = account
        if repo and private and not account.may_read(repo):
            raise HubError(404, "Repository not found", "RepoNotFound")
        if repo and needs == "write" and not account.may_write(repo):
            raise HubError(403, f"this token may not write to {repo}")

    def _create_repo(self, request: Request) -> Reply:
        asked = request.json()
        repo = f"{asked.get('organization') or 'rehearsal'}/{asked['name']}"
        if not re.fullmatch(_REPO, repo) or asked.get("type", "model") != "model":
            raise HubError(400, "only model repositories with a plain name")
        account = request.account
        if account.only_repo is not None or not account.may_write(repo):
            raise HubError(403, f"this token may not make {repo}")
        document = {"url": f"{self.url}/{repo}", "name": repo, "id": repo}
        try:
            self.store.create_repo(repo, private=asked.get("visibility") == "private")
        except HubError as err:
            return Reply(err.status, document | {"error": err.message})
        return Reply(document=document)

    def _validate_yaml(self, request: Request) -> Reply:
        content = str(request.json()["content"])
        match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        if not match:
            return Reply(document={"errors": [], "warnings": [{"message": "empty or missing yaml metadata"}]})
        try:
            metadata = yaml.safe_load(match[1])
        except yaml.YAMLError as err:
            return Reply(400, {"errors": [{"message": str(err)}], "warnings": []})
        if not isinstance(metadata, dict):
            return Reply(400, {"errors": [{"message": "metadata is no mapping"}], "warnings": []})
        return Reply(document={"errors": [], "warnings": []})

    def _preupload(self, request: Request) -> Reply:
        tree = self._commit(request).tree
        files, patterns, document = [], [], request.json()
        if ".gitignore" in tree or "gitIgnore" in document:
            kept = (
                self.store.object_path(tree[".gitignore"].sha256).read_text if ".gitignore" in tree else str
            )
            patterns = str(document.get("gitIgnore") if "gitIgnore" in document else kept()).split()
        for asked in document["files"]:
            path = str(asked["path"])
            known = tree.get(path)
            oid = None if known is None else known.sha256 if known.lfs else known.blob
            mode = self.store.upload_mode(path, int(asked["size"]))
            ignored = any(fnmatch.fnmatch(path, p) or fnmatch.fnmatch(Path(path).name, p) for p in patterns)
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": ignored, "oid": oid})
        return Reply(document={"files": files})

    def _xet_token(self, request: Request) -> Reply:
        self._check_gate(request)
        self.store.resolve(request.parts["repo"], request.parts["rev"])
        expiry = int(time.time()) + 3600
        cas = self.store.xet.cas_url
        return Reply(
            document={"casUrl": cas, "accessToken": "loopback", "exp": expiry},
            headers={
                "X-Xet-Cas-Url": cas,
                "X-Xet-Access-Token": "loopback",
                "X-Xet-Token-Expiration": str(expiry),
            },
        )

    def _lfs_batch(self, request: Request) -> Reply:
        objects = []
        for asked in request.json()["objects"]:
            oid, size = str(asked["oid"]), int(asked["size"])
            entry: dict[str, Any] = {"oid": oid, "size": size}
            if self.store.content_size(oid) is None:
                entry["actions"] = {"upload": {"href": f"{self.url}/lfs/{oid}"}}
            objects.append(entry)
        return Reply(document={"transfer": "basic", "objects": objects})

    def _lfs_put(self, request: Request) -> Reply:
        self.store.put_object(request.body, request.parts["oid"])
        return Reply(document={})

    def _create_commit(self, request: Request) -> Reply:
        repo, revision = request.parts["repo"], request.parts["rev"]
        header: dict[str, Any] = {}
        regular: dict[str, bytes] = {}
        lfs: dict[str, str] = {}
        deleted: list[str] = []
        folders: list[str] = []
        for line in request.body.read().splitlines():
            item = json.loads(line)
            value = item["value"]
            match item["key"]:
                case "header":
                    header = value
                case "file":
                    regular[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    lfs[value["path"]] = value["oid"]
                case "deletedFile":
                    deleted.append(value["path"])
                case "deletedFolder":
                    folders.append(value["path"])
                case other:
                    raise HubError(400, f"unknown operation {other}")
        title = str(header.get("summary", ""))
        pull_request = None
        if request.query.get("create_pr") == ["1"]:
            number = self.store.open_discussion(
                repo, title=title, description="", pull_request=True, author=request.account.name
            )
            revision = f"refs/pr/{number}"
            pull_request = f"{self.url}/{repo}/discussions/{number}"
        oid = self.store.add_commit(
            repo,
            revision,
            title=title,
            message=str(header.get("description", "")),
            parent=header.get("parentCommit"),
            regular=regular,
            lfs=lfs,
            deleted=deleted,
            deleted_folders=folders,
        )
        document: dict[str, Any] = {
            "success": True,
            "commitOid": oid,
            "commitUrl": f"{self.url}/{repo}/commit/{oid}",
        }
        return Reply(document=document | {"pullRequestUrl": pull_request})

    def _info(self, request: Request) -> Reply:
        repo = request.parts["repo"]
        state, commit = self.store.state(repo), self._commit(request)
        return Reply(
            document={
                "id": repo,
                "modelId": repo,
                "author": repo.split("/")[0],
                "sha": commit.oid,
                "private": state.private,
                "gated": state.gated,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "createdAt": state.created,
                "lastModified": commit.date,
                "siblings": [{"rfilename": path} for path in sorted(commit.tree)],
            }
        )

    def _tree(self, request: Request) -> Reply:
        tree = self._commit(request).tree
        prefix = request.parts.get("path", "")
        prefix = prefix + "/" if prefix else ""
        recursive = request.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries: dict[str, dict[str, Any]] = {}
        for path in sorted(p for p in tree if p.startswith(prefix)):
            names = path[len(prefix) :].split("/")
            for depth in range(1, len(names) if recursive else min(2, len(names))):
                folder = prefix + "/".join(names[:depth])
                entries[folder] = {"type": "directory", "path": folder, "oid": "0" * 40, "size": 0}
            if recursive or len(names) == 1:
                entries[path] = self._tree_entry(path, tree[path])
        if prefix and not entries:
            raise HubError(404, f"{prefix} does not exist", "EntryNotFound")
        start = int(request.query.get("cursor", ["0"])[0])
        listed = list(entries.values())
        headers = {}
        if start + _PAGE < len(listed):
            address = f"{self.url}{request.path}?recursive={recursive}&cursor={start + _PAGE}"
            headers["Link"] = f'<{address}>; rel="next"'
        return Reply(document=listed[start : start + _PAGE], headers=headers)

    def _tree_entry(self, path: str, file: TreeFile) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "size": file.size, "oid": file.blob}
        if file.lfs:
            entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": file.pointer_size}
            if xet := self.store.xet_file(file.sha256):
                entry["xetHash"] = xet.xet_hash
        return entry

    def _paths_info(self, request: Request) -> Reply:
        asked = set(request.json()["paths"])
        tree = self._commit(request).tree
        return Reply(document=[self._tree_entry(p, f) for p, f in sorted(tree.items()) if p in asked])

    def _refs(self, request: Request) -> Reply:
        refs = self.store.state(request.parts["repo"]).refs
        document: dict[str, list[dict[str, str]]] = {"converts": []}
        for key, prefix in (
            ("branches", "refs/heads/"),
            ("tags", "refs/tags/"),
            ("pullRequests", "refs/pr/"),
        ):
            document[key] = [
                {"name": name.removeprefix(prefix), "ref": name, "targetCommit": oid}
                for name, oid in refs.items()
                if name.startswith(prefix)
            ]
        return Reply(document=document)

    def _commits(self, request: Request) -> Reply:
        repo = request.parts["repo"]
        commit: Commit | None = self._commit(request)
        listed = []
        while commit is not None:
            listed.append(
                {"id": commit.oid, "title": commit.title, "message": commit.message, "date": commit.date,
                 "authors": [{"user": "rehearsal"}]}
            )  # fmt: skip
            commit = self.store.commit(repo, commit.parent) if commit.parent else None
        return Reply(document=listed)

    def _make_tag(self, request: Request) -> Reply:
        name = f"refs/tags/{request.json()['tag']}"
        self.store.set_ref(request.parts["repo"], name, request.parts["rev"])
        return Reply(document={})

    def _delete_tag(self, request: Request) -> Reply:
        self.store.delete_ref(request.parts["repo"], f"refs/tags/{request.parts['rev']}")
        return Reply(document={})

    def _make_branch(self, request: Request) -> Reply:
        start = request.json().get("startingPoint", "main")
        self.store.set_ref(request.parts["repo"], f"refs/heads/{request.parts['rev']}", start)
        return Reply(document={})

    def _check_gate(self, request: Request) -> None:
        """Of a gated repository only its writers get contents: nobody is ever let in here."""
        repo, account = request.parts["repo"], request.account
        if self.store.state(repo).gated and not account.may_write(repo):
            raise HubError(403 if account.name else 401, f"Access to model {repo} is restricted", "GatedRepo")

    def _resolve(self, request: Request) -> Reply:
        repo, path = request.parts["repo"], request.parts["path"]
        commit = self._commit(request)
        self._check_gate(request)
        file = commit.tree.get(path)
        if file is None:
            raise HubError(404, "Entry not found", "EntryNotFound")
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{file.blob}"', "Accept-Ranges": "bytes"}
        if not file.lfs:
            return self._bytes_of(file.sha256, request, headers)
        headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
        if xet := self.store.xet_file(file.sha256):
            token = f"{self.url}/api/models/{repo}/xet-read-token/{commit.oid}"
            headers |= {"X-Xet-Hash": xet.xet_hash, "Link": f'<{token}>; rel="xet-auth"'}
        if request.path.startswith(f"/{repo}/content/"):
            return self._bytes_of(file.sha256, request, headers | {"ETag": f'"{file.sha256}"'})
        # With one host only, the client follows at once and looks for the metadata on the second answer: both
        # carry it.
        location = f"{self.url}/{repo}/content/{commit.oid}/{quote(path)}"
        if self._storage_host:
            location = f"{self.storage_url}/objects/{file.sha256}?signature={self.signature}"
        return Reply(302, None, headers | {"Location": location})

    def _answer_storage(self, request: Request) -> Reply:
        """What a storage host gives for a signed link: bytes, and refusals that are not the hub's own."""
        oid = request.path.removeprefix("/objects/")
        if "authorization" in request.headers:
            return Reply(400, {"error": "a signed link and a token: only one may be sent"})
        if request.query.get("signature") != [str(self.signature)]:
            return Reply(403, {"error": "the link has expired"})
        try:
            return self._bytes_of(oid, request, {"ETag": f'"{oid[:32]}"', "Accept-Ranges": "bytes"})
        except HubError as err:
            return Reply(err.status, {"error": err.message})

    def _bytes_of(self, sha256: str, request: Request, headers: dict[str, str]) -> Reply:
        stream = self.store.open_object(sha256, f"{self.url}/api/xet-token")
        size = stream.seek(0, 2)
        first, last = 0, size - 1
        if asked := request.headers.get("range"):
            match = re.fullmatch(r"bytes=(\d*)-(\d*)", asked)
            if match and (match[1] or match[2]):
                first = int(match[1]) if match[1] else max(0, size - int(match[2]))
                last = min(last, int(match[2])) if match[1] and match[2] else last
            if not match or first > last:
                stream.close()
                return Reply(416, None, headers | {"Content-Range": f"bytes */{size}"})
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        stream.seek(first)
        headers["Content-Type"] = "application/octet-stream"
        return Reply(206 if "Content-Range" in headers else 200, None, headers, stream, last - first + 1)

    def _loopback_xet_token(self, _: Request) -> Reply:
        return Reply(document={"casUrl": self.store.xet.cas_url, "accessToken": "loopback", "exp": 1 << 40})

    def _commit(self, request: Request) -> Commit:
        return self.store.commit(request.parts["repo"], request.parts.get("rev", "main"))


_Action = Callable[[LoopbackHub, Request], Reply]


def _route(
    method: str, pattern: str, action: _Action, needs: str = ""
) -> tuple[str, re.Pattern[str], _Action, str]:
    """`needs`: nothing, a token, or one that may write to the repository."""
    return method, re.compile(pattern), action, needs


_NUM = r"/discussions/(?P<num>\d+)"
_SLUG = r"/api/collections/(?P<slug>[^/]+/[^/]+)"
_ROUTES = [
    _route("GET", "/api/whoami-v2", community.whoami, "token"),
    _route("POST", "/oauth/token", community.exchange_token),
    _route("GET", "/api/settings/repositories", community.list_storage, "token"),
    _route(
        "GET", r"/api/organizations/(?P<org>[^/]+)/settings/repositories", community.list_storage, "token"
    ),
    _route("POST", "/api/collections", community.make_collection, "token"),
    _route("GET", _SLUG, community.read_collection),
    _route("POST", rf"{_SLUG}/items", community.add_to_collection, "token"),
    _route("GET", rf"{_API}/auth-check(?P<write>/write)?", community.check_access, "token"),
    _route("PUT", rf"{_API}/settings", community.change_settings, "write"),
    _route("GET", rf"{_API}/discussions", community.list_discussions),
    _route("POST", rf"{_API}/discussions", community.open_discussion, "token"),
    _route("GET", rf"{_API}{_NUM}", community.read_discussion),
    _route("POST", rf"{_API}{_NUM}/comment", community.comment, "token"),
    _route("POST", rf"{_API}{_NUM}/status", community.set_status, "write"),
    _route("POST", rf"{_API}{_NUM}/merge", community.merge, "write"),
    _route("GET", "/api/xet-token", LoopbackHub._loopback_xet_token),
    _route("POST", "/api/repos/create", LoopbackHub._create_repo, "token"),
    _route("POST", "/api/validate-yaml", LoopbackHub._validate_yaml),
    _route("POST", rf"{_API}/preupload/{_REV}", LoopbackHub._preupload, "token"),
    _route("GET", rf"{_API}/xet-read-token/{_REV}", LoopbackHub._xet_token),
    _route("GET", rf"{_API}/xet-write-token/{_REV}", LoopbackHub._xet_token, "write"),
    _route("POST", rf"{_API}/commit/{_REV}", LoopbackHub._create_commit, "write"),
    _route("POST", rf"{_API}/paths-info/{_REV}", LoopbackHub._paths_info),
    _route("POST", rf"{_API}/tag/{_REV}", LoopbackHub._make_tag, "write"),
    _route("DELETE", rf"{_API}/tag/{_REV}", LoopbackHub._delete_tag, "write"),
    _route("POST", rf"{_API}/branch/{_REV}", LoopbackHub._make_branch, "write"),
    _route("GET", rf"{_API}/refs", LoopbackHub._refs),
    _route("GET", rf"{_API}/commits/{_REV}", LoopbackHub._commits),
    _route("GET", rf"{_API}/tree/{_REV}(?:/(?P<path>.+))?", LoopbackHub._tree),
    _route("GET", rf"{_API}/revision/{_REV}", LoopbackHub._info),
    _route("GET", _API, LoopbackHub._info),
    _route("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", LoopbackHub._lfs_batch, "write"),
    _route("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", LoopbackHub._lfs_put),
    _route("GET", rf"/{_REPO}/(?:resolve|content)/{_REV}/(?P<path>.+)", LoopbackHub._resolve),
]
