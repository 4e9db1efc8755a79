"""What the loopback hub keeps on disk: repositories, commits, references, pull requests, file contents.

DIR/objects/ab/abcd…      file contents by SHA-256
DIR/cas/                  the store that hf_xet fills
DIR/repos/org/name/commits/<oid>.json   message, parent and complete tree of a commit
DIR/collections.json                    collections by slug
DIR/repos/org/name/repo.json            references and discussions; replaced atomically, so that every
                                        change of the repository happens at one instant or not at all
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Literal

from pydantic import BaseModel, ConfigDict

from packager.publish.xet_cas import XetFile, XetStore

MAIN = "refs/heads/main"
_LFS_ATTRIBUTES = (
    "*.safetensors filter=lfs diff=lfs merge=lfs -text\n*.bin filter=lfs diff=lfs merge=lfs -text\n"
)
_LFS_PATTERNS = ("*.safetensors", "*.bin", "*.gguf", "*.pt", "*.onnx", "*.zip", "*.tar.gz")
_LFS_THRESHOLD = 10 * 1024 * 1024


class HubError(Exception):
    """An answer other than 2xx: HTTP status, and the hub's error code where it has one."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class TreeFile(BaseModel):
    """One file of a commit."""

    model_config = ConfigDict(frozen=True)

    size: int
    sha256: str
    blob: str
    """Git object id: of the content, or of the LFS pointer."""
    lfs: bool
    pointer_size: int = 0


class Commit(BaseModel):
    """One commit with its whole tree."""

    model_config = ConfigDict(frozen=True)

    parent: str | None
    title: str
    message: str = ""
    date: str
    tree: dict[str, TreeFile]

    @property
    def oid(self) -> str:
        """40 hex digits."""
        return hashlib.sha1(self.model_dump_json().encode(), usedforsecurity=False).hexdigest()


class Discussion(BaseModel):
    """A discussion or pull request."""

    num: int
    title: str
    description: str
    is_pull_request: bool
    status: str
    """draft, open, closed or merged."""
    created: str
    base: str
    """Commit of main from which a pull request starts."""
    merge_commit: str | None = None
    author: str = "rehearsal"
    comments: list[str] = []


class RepoState(BaseModel):
    """What changes in a repository, as one document."""

    private: bool = False
    gated: Literal[False, "auto", "manual"] = False
    created: str
    refs: dict[str, str]
    """Full reference name to commit oid."""
    discussions: list[Discussion] = []


def now() -> str:
    """The time in the hub's format."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def git_blob_id(data: bytes) -> str:
    """Git's object id (SHA-1, hex) of a file with this content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _lfs_file(sha256: str, size: int) -> TreeFile:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
    return TreeFile(size=size, sha256=sha256, blob=git_blob_id(pointer), lfs=True, pointer_size=len(pointer))


class HubStore:
    """The hub's state under one directory; every public method may be called from many threads."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.xet = XetStore(root / "cas")
        self.received: Counter[str] = Counter()
        """Bytes that came by LFS for each SHA-256, whole uploads and others."""
        self._lock = threading.RLock()
        for name in ("objects", "cas", "repos"):
            (root / name).mkdir(parents=True, exist_ok=True)

    # ---- contents -------------------------------------------------------------------------------------

    def object_path(self, sha256: str) -> Path:
        """Where the content with this SHA-256 lies, or would lie."""
        return self.root / "objects" / sha256[:2] / sha256

    def content_size(self, sha256: str) -> int | None:
        """Bytes of a content the hub has, whichever way it came; None: it has it not."""
        path = self.object_path(sha256)
        if path.is_file():
            return path.stat().st_size
        file = self.xet.find(sha256)
        return file.size if file else None

    def xet_file(self, sha256: str) -> XetFile | None:
        """The Xet identity of a content that came through hf_xet."""
        with self._lock:
            return self.xet.find(sha256)

    def put_object(self, stream: BinaryIO, sha256: str) -> int:
        """Store a content under the SHA-256 that was announced for it; returns its size in bytes.

        Raises:
            HubError: 422, the bytes have another SHA-256.
        """
        digest, size = hashlib.sha256(), 0
        with tempfile.TemporaryDirectory(dir=self.root) as scratch:
            arriving = Path(scratch) / "object"
            with arriving.open("wb") as part:
                while chunk := stream.read(1 << 20):
                    digest.update(chunk)
                    size += len(chunk)
                    with self._lock:
                        self.received[sha256] += len(chunk)
                    part.write(chunk)
                part.flush()
                os.fsync(part.fileno())
            if digest.hexdigest() != sha256:
                raise HubError(422, f"the uploaded bytes do not have SHA-256 {sha256}")
            target = self.object_path(sha256)
            target.parent.mkdir(exist_ok=True)
            arriving.replace(target)
        return size

    def open_object(self, sha256: str, refresh_url: str) -> BinaryIO:
        """The content's bytes; one that came through Xet is put together and checked on first use.

        Raises:
            HubError: 404, no such content; 500, what Xet gives back has another SHA-256.
        """
        path = self.object_path(sha256)
        if not path.is_file():
            file = self.xet_file(sha256)
            if file is None:
                raise HubError(404, f"no object {sha256}")
            with tempfile.TemporaryDirectory(dir=self.root) as scratch:
                part = Path(scratch) / "object"
                self.xet.extract(file, part, refresh_url)
                with part.open("rb") as stream:
                    if hashlib.file_digest(stream, "sha256").hexdigest() != sha256:
                        raise HubError(500, f"Xet gave other bytes for {sha256}")
                path.parent.mkdir(exist_ok=True)
                shutil.move(part, path)
        return path.open("rb")

    # ---- repositories ---------------------------------------------------------------------------------

    def create_repo(self, repo_id: str, *, private: bool) -> None:
        """A repository with its first commit, which holds `.gitattributes` alone, as on the real hub.

        Raises:
            HubError: 409, it is there already.
        """
        with self._lock:
            directory = self._directory(repo_id)
            if (directory / "repo.json").exists():
                raise HubError(409, "You already created this model repo")
            data = _LFS_ATTRIBUTES.encode()
            commit = Commit(
                parent=None,
                title="initial commit",
                date=now(),
                tree={".gitattributes": self._regular_file(data)},
            )
            self._write_commit(repo_id, commit)
            self._write_state(repo_id, RepoState(private=private, created=now(), refs={MAIN: commit.oid}))

    def exists(self, repo_id: str) -> bool:
        """Is there such a repository?"""
        return (self._directory(repo_id) / "repo.json").is_file()

    def repositories(self) -> list[str]:
        """`org/name` of every repository."""
        root = self.root / "repos"
        return sorted(str(p.parent.relative_to(root)) for p in root.glob("*/*/repo.json"))

    def change_settings(
        self, repo_id: str, *, gated: Literal[False, "auto", "manual"] | None, private: bool | None
    ) -> None:
        """Change what is not None. Raises HubError 404 if there is no such repository."""
        with self._lock:
            state = self.state(repo_id)
            state.gated = state.gated if gated is None else gated
            state.private = state.private if private is None else private
            self._write_state(repo_id, state)

    def state(self, repo_id: str) -> RepoState:
        """References and discussions of a repository. Raises HubError 404 if there is none."""
        try:
            return RepoState.model_validate_json((self._directory(repo_id) / "repo.json").read_bytes())
        except FileNotFoundError:
            raise HubError(404, "Repository not found", "RepoNotFound") from None

    def resolve(self, repo_id: str, revision: str) -> str:
        """Commit oid of a branch, tag, full reference or oid. Raises HubError 404 if there is none."""
        refs = self.state(repo_id).refs
        for name in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if name in refs:
                return refs[name]
        if len(revision) == 40 and (self._directory(repo_id) / "commits" / f"{revision}.json").is_file():
            return revision
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def commit(self, repo_id: str, revision: str) -> Commit:
        """The commit that a revision names."""
        oid = self.resolve(repo_id, revision)
        return Commit.model_validate_json((self._directory(repo_id) / "commits" / f"{oid}.json").read_bytes())

    def upload_mode(self, path: str, size: int) -> str:
        """`lfs` or `regular`: how a file must be uploaded."""
        large = size > _LFS_THRESHOLD or any(fnmatch.fnmatch(path, pattern) for pattern in _LFS_PATTERNS)
        return "lfs" if large else "regular"

    def add_commit(
        self,
        repo_id: str,
        revision: str,
        *,
        title: str,
        message: str,
        parent: str | None,
        regular: Mapping[str, bytes],
        lfs: Mapping[str, str],
        deleted: Iterable[str],
        deleted_folders: Iterable[str],
    ) -> str:
        """Commit to a branch or to the head of a pull request, all or nothing; returns the commit's oid.

        Args:
            regular: path to content.
            lfs: path to SHA-256 of a content uploaded before.

        Raises:
            HubError: 412, the head is no longer `parent`; 422, an LFS content was never uploaded;
                404, a file to delete is not there.
        """
        with self._lock:
            state = self.state(repo_id)
            name = revision if revision.startswith("refs/") else f"refs/heads/{revision}"
            if name not in state.refs or name.startswith("refs/tags/"):
                raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            head = state.refs[name]
            if parent is not None and parent != head:
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            tree = dict(self.commit(repo_id, head).tree)
            for folder in deleted_folders:
                tree = {p: f for p, f in tree.items() if not p.startswith(folder.rstrip("/") + "/")}
            for path in deleted:
                if tree.pop(path, None) is None:
                    raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            for path, sha256 in lfs.items():
                size = self.content_size(sha256)
                if size is None:
                    raise HubError(422, f"{path} is an LFS pointer to a file that does not exist: {sha256}")
                tree[path] = _lfs_file(sha256, size)
            for path, data in regular.items():
                tree[path] = self._regular_file(data)
            commit = Commit(parent=head, title=title, message=message, date=now(), tree=tree)
            self._write_commit(repo_id, commit)
            state.refs[name] = commit.oid
            self._write_state(repo_id, state)
            return commit.oid

    def set_ref(self, repo_id: str, name: str, revision: str) -> None:
        """Make a new tag or branch (full reference name). Raises HubError 409 if it is there already."""
        with self._lock:
            oid = self.resolve(repo_id, revision)
            state = self.state(repo_id)
            if name in state.refs:
                raise HubError(409, f"{name} already exists")
            state.refs[name] = oid
            self._write_state(repo_id, state)

    def delete_ref(self, repo_id: str, name: str) -> None:
        """Remove a tag or branch. Raises HubError 404 if it is not there."""
        with self._lock:
            state = self.state(repo_id)
            if state.refs.pop(name, None) is None:
                raise HubError(404, f"Invalid rev id: {name}", "RevisionNotFound")
            self._write_state(repo_id, state)

    # ---- discussions and pull requests ----------------------------------------------------------------

    def open_discussion(
        self, repo_id: str, *, title: str, description: str, pull_request: bool, author: str = "rehearsal"
    ) -> int:
        """Open a discussion, or a draft pull request that starts at main; returns its number."""
        with self._lock:
            state = self.state(repo_id)
            number = len(state.discussions) + 1
            base = state.refs[MAIN]
            state.discussions.append(
                Discussion(
                    num=number,
                    title=title,
                    description=description,
                    is_pull_request=pull_request,
                    status="draft" if pull_request else "open",
                    created=now(),
                    base=base,
                    author=author,
                )
            )
            if pull_request:
                state.refs[f"refs/pr/{number}"] = base
            self._write_state(repo_id, state)
            return number

    def discussion(self, repo_id: str, number: int) -> Discussion:
        """One discussion. Raises HubError 404 if there is none."""
        for discussion in self.state(repo_id).discussions:
            if discussion.num == number:
                return discussion
        raise HubError(404, f"no discussion {number}")

    def add_comment(self, repo_id: str, number: int, text: str) -> Discussion:
        """A comment on a discussion. Raises HubError 404 if there is none."""
        with self._lock:
            state, discussion = self._discussion_in(repo_id, number)
            discussion.comments.append(text)
            self._write_state(repo_id, state)
            return discussion

    def set_status(self, repo_id: str, number: int, status: str) -> None:
        """Open (also: publish a draft) or close. Raises HubError 409 for a merged one."""
        with self._lock:
            state, discussion = self._discussion_in(repo_id, number)
            if discussion.status == "merged":
                raise HubError(409, "This pull request is merged already")
            discussion.status = status
            self._write_state(repo_id, state)

    def merge(self, repo_id: str, number: int) -> str:
        """Bring a pull request into main in one step; returns the new head of main.

        Raises:
            HubError: 409, not an open pull request, or main changed the same files since it began.
        """
        with self._lock:
            state, request = self._discussion_in(repo_id, number)
            if not request.is_pull_request or request.status != "open":
                raise HubError(409, f"This pull request is {request.status}; only an open one can be merged")
            head = self.commit(repo_id, f"refs/pr/{number}").tree
            base = self.commit(repo_id, request.base).tree
            ours = self.commit(repo_id, MAIN).tree
            changed = {p for p in {*head, *base} if head.get(p) != base.get(p)}
            conflicts = sorted(
                p for p in changed if ours.get(p) != base.get(p) and ours.get(p) != head.get(p)
            )
            if conflicts:
                raise HubError(409, f"Conflicts in {', '.join(conflicts)}")
            tree = {p: f for p, f in ours.items() if p not in changed}
            tree.update({p: head[p] for p in changed if p in head})
            commit = Commit(
                parent=state.refs[MAIN], title=f"{request.title} (#{number})", date=now(), tree=tree
            )
            self._write_commit(repo_id, commit)
            state.refs[MAIN] = commit.oid
            request.status, request.merge_commit = "merged", commit.oid
            self._write_state(repo_id, state)
            return commit.oid

    # ---- collections ----------------------------------------------------------------------------------

    def collections(self) -> dict[str, Any]:
        """Slug to title, visibility and items of every collection."""
        try:
            found: dict[str, Any] = json.loads((self.root / "collections.json").read_bytes())
        except FileNotFoundError:
            return {}
        return found

    def put_collection(self, slug: str, document: dict[str, Any]) -> None:
        """Make or replace a collection."""
        with self._lock:
            everything = self.collections() | {slug: document}
            _replace(self.root / "collections.json", json.dumps(everything, indent=1).encode())

    # ---- files of the store ---------------------------------------------------------------------------

    def _discussion_in(self, repo_id: str, number: int) -> tuple[RepoState, Discussion]:
        state = self.state(repo_id)
        for discussion in state.discussions:
            if discussion.num == number:
                return state, discussion
        raise HubError(404, f"no discussion {number}")

    def _regular_file(self, data: bytes) -> TreeFile:
        sha256 = hashlib.sha256(data).hexdigest()
        _replace(self.object_path(sha256), data)
        return TreeFile(size=len(data), sha256=sha256, blob=git_blob_id(data), lfs=False)

    def _directory(self, repo_id: str) -> Path:
        return self.root / "repos" / repo_id

    def _write_commit(self, repo_id: str, commit: Commit) -> None:
        _replace(
            self._directory(repo_id) / "commits" / f"{commit.oid}.json", commit.model_dump_json().encode()
        )

    def _write_state(self, repo_id: str, state: RepoState) -> None:
        document: dict[str, Any] = state.model_dump()
        _replace(self._directory(repo_id) / "repo.json", json.dumps(document, indent=1).encode())


def _replace(target: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all, also after a power cut."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as part:
        part.write(data)
        part.flush()
        os.fsync(part.fileno())
    Path(part.name).replace(target)
