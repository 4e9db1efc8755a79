"""A commit of a hub repository as a folder of files, read by byte ranges; nothing is stored on this machine.

    listing   the tree of the commit: size, and SHA-256 (LFS) or git object id, of every file
    locating  HEAD of a weight file: the storage address, and that its size and SHA-256 are the listed ones
    reading   GET with Range on that address; a broken connection goes on at the byte where it broke

Names, headers, tokens, sessions and errors are huggingface_hub's own. Faults that may pass (lost connections,
408, 429, 5xx) are met with further attempts after growing waits; anything else is an error at once. A file
that is read from its first byte to its last is held against its SHA-256, whichever readers read it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urljoin, urlsplit

from packager.artifact import MANIFEST_NAME, Manifest, parse_manifest
from packager.checkpoint.folder import Folder, OpenFile
from packager.checkpoint.header import ShardHeader, header_length, header_of, unsound
from packager.checkpoint.hub_faults import PassingFault, Patience, hub_faults
from packager.checkpoint.hub_name import HubName, is_commit
from packager.errors import BadInput, IntegrityFailure, RemoteFailure

if TYPE_CHECKING:
    import httpx
    from huggingface_hub import HfApi

_HEADER_GUESS = 1 << 18
"""Bytes asked for first of a weight file: the headers of most fit in, so that one answer is enough."""
_HEADERS_AT_ONCE = 8
_SMALL = 1 << 24
"""Configurations and tokenizers up to this size are fetched once and kept."""
_READ_AHEAD = 1 << 28
"""Bytes that one request asks for at most while a file is read in order."""
_EARLY_PIECE, _EARLY_BYTES = 1 << 18, 1 << 20
"""Bytes of one read, and of all reads of a file, that are kept to be hashed when their turn comes."""
_SETTLE_BYTES = 1 << 22
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class _Listed:
    """A file of the commit, as its tree lists it."""

    size: int
    blob: str
    """Git object id (SHA-1) of the content; of the pointer where there is a `sha256`."""
    sha256: str | None
    """Of the content of an LFS file."""

    def __post_init__(self) -> None:
        if type(self.size) is not int or self.size < 0:
            raise ValueError(f"a file of size {self.size!r}")
        if not re.fullmatch("[0-9a-f]{40}", self.blob):
            raise ValueError(f"a file with object id {self.blob!r}")
        if self.sha256 is not None and not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise ValueError(f"a file with SHA-256 {self.sha256!r}")

    @property
    def etag(self) -> str:
        """What the hub sends as its entity tag."""
        return self.sha256 or self.blob

    def new_hash(self) -> Any:
        """The hash object that becomes `etag` (as hexdigest) once it has taken the whole content."""
        if self.sha256:
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)


class HubFolder(Folder):
    """The files of a commit. May be used from many threads, and sent to other processes."""

    def __init__(self, name: HubName, *, endpoint: str | None = None, subfolder: str = "") -> None:
        """Resolve the revision and list the files.

        Args:
            name: repository and revision; a branch or tag is resolved now, once.
            endpoint: hub address; None: HF_ENDPOINT or huggingface.co.
            subfolder: the folder within the repository; "" is its root.

        Raises:
            UsageProblem: the client is offline by choice.
            RemoteFailure: no hub, no such repository or revision, or no right to read it.
        """
        from huggingface_hub import constants

        self.repo = name.repo
        self.endpoint = (endpoint or os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
        self.path = None
        self._subfolder = subfolder
        self.commit = name.revision if is_commit(name.revision) else self._resolve(name.revision)
        self.name = f"hf://{self.repo}@{self.commit}" + (f"/{subfolder}" if subfolder else "")
        self._tree = self._list()
        self._set_up()

    def _set_up(self) -> None:
        self._guard = threading.Lock()
        self._locations: dict[str, str] = {}
        self._checks: dict[str, _Check] = {}
        self._small: dict[str, bytes] = {}

    def __getstate__(self) -> dict[str, Any]:
        own = ("_guard", "_locations", "_checks", "_small")
        return {key: value for key, value in self.__dict__.items() if key not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._set_up()

    def _resolve(self, revision: str) -> str:
        commit = self._ask(lambda api: api.repo_info(self.repo, revision=revision).sha)
        if commit is None or not is_commit(commit):
            raise RemoteFailure(
                f"{self.endpoint} does not say which commit {revision} of {self.repo} is",
                "Name the commit: hf://organisation/name@<40 hexadecimal digits>.",
            )
        return commit

    def _list(self) -> dict[str, _Listed]:
        from huggingface_hub.hf_api import RepoFile

        def ask(api: HfApi) -> dict[str, _Listed]:
            entries = api.list_repo_tree(self.repo, revision=self.commit, recursive=True)
            files = [entry for entry in entries if isinstance(entry, RepoFile)]
            return {
                entry.path: _Listed(entry.size, entry.blob_id, entry.lfs.sha256 if entry.lfs else None)
                for entry in files
            }

        return self._ask(ask)

    def _ask(self, question: Callable[[HfApi], _Result]) -> _Result:
        """Put a question to the hub's API, again where a fault may pass."""
        from huggingface_hub import HfApi

        patience = Patience()
        while True:
            try:
                with hub_faults(self.repo, self.endpoint):
                    return question(HfApi(endpoint=self.endpoint))
            except PassingFault as fault:
                patience.wait(fault)
            except (KeyError, TypeError, AttributeError, ValueError) as err:
                raise RemoteFailure(
                    f"{self.endpoint} does not answer as a hub does: {type(err).__name__} {err}",
                    "Check HF_ENDPOINT.",
                ) from None

    # ---- what a folder does ---------------------------------------------------------------------------

    def sizes(self) -> Mapping[str, int]:
        prefix = f"{self._subfolder}/" if self._subfolder else ""
        inside = {path.removeprefix(prefix): f for path, f in self._tree.items() if path.startswith(prefix)}
        return {name: file.size for name, file in inside.items() if "/" not in name}

    def open(self, name: str) -> OpenFile:
        return _HubFile(self, self._path(name))

    def read(self, name: str) -> bytes:
        with self._guard:
            if name in self._small:
                return self._small[name]
        data = super().read(name)
        file = self.listed(self._path(name))
        found = file.new_hash()
        found.update(data)
        if found.hexdigest() != file.etag:
            raise self.corrupt(self._path(name))
        if len(data) <= _SMALL and not name.endswith(".safetensors"):
            with self._guard:
                self._small[name] = data
        return data

    def sha256(self, name: str) -> str:
        return self.listed(self._path(name)).sha256 or hashlib.sha256(self.read(name)).hexdigest()

    def child(self, name: str) -> Folder | None:
        if self._subfolder or f"{name}/config.json" not in self._tree:
            return None
        return HubFolder(HubName(self.repo, self.commit), endpoint=self.endpoint, subfolder=name)

    def headers(self, names: Iterable[str]) -> dict[str, ShardHeader | BadInput]:
        wanted = list(names)
        with ThreadPoolExecutor(_HEADERS_AT_ONCE) as pool:
            return dict(zip(wanted, pool.map(self._header, wanted), strict=True))

    def identity(self, name: str) -> str:
        file = self.listed(self._path(name))
        return f"{'sha256' if file.sha256 else 'git'}:{file.etag}"

    def stated_sha256(self, name: str) -> str | None:
        return self.listed(self._path(name)).sha256

    def settle(self, name: str) -> None:
        path = self._path(name)
        size, check = self.listed(path).size, self.check_of(path)
        handle = _HubFile(self, path)
        try:
            while (begin := check.position) < size:
                handle.fill(memoryview(bytearray(min(_SETTLE_BYTES, size - begin))), begin)
        finally:
            handle.close()

    def manifest(self, *, deep: bool, hashed: Mapping[str, str] | None = None) -> Manifest | None:
        if MANIFEST_NAME not in self.sizes():
            return None
        manifest = parse_manifest(self.read(MANIFEST_NAME), self.where(MANIFEST_NAME))
        problems = []
        for entry in manifest.files:
            file = self._tree.get(self._path(entry.path))
            if file is None:
                problems.append(f"missing: {entry.path}")
            elif file.size != entry.size or (
                (file.sha256 or not entry.path.endswith(".safetensors") or deep)
                and ((hashed or {}).get(entry.path) or self.sha256(entry.path)) != entry.sha256
            ):
                problems.append(f"changed: {entry.path}")
        known = {self._path(entry.path) for entry in manifest.files} | {self._path(MANIFEST_NAME)}
        inside = [path for path in self._tree if path.startswith(self._path(""))]
        # The attributes file is the hub's own: it puts one into every repository.
        problems += [f"stray: {path}" for path in sorted({*inside} - known - {".gitattributes"})]
        if problems:
            raise IntegrityFailure(
                f"{self.name} is not what was sealed:\n" + "\n".join(f"  {line}" for line in problems),
                "Publish the artifact again.",
            )
        return manifest

    # ---- what its open files need ---------------------------------------------------------------------

    def _path(self, name: str) -> str:
        return f"{self._subfolder}/{name}" if self._subfolder else name

    def listed(self, path: str) -> _Listed:
        """The tree's entry of a path. Raises BadInput: there is none."""
        try:
            return self._tree[path]
        except KeyError:
            raise BadInput(f"{self.repo}@{self.commit} has no file {path}") from None

    def corrupt(self, path: str) -> IntegrityFailure:
        """The error of bytes that are not the listed ones."""
        return IntegrityFailure(
            f"the bytes of {path} in {self.repo}@{self.commit} are not those that the hub lists",
            "Run the same command again; if it happens again, something on the way alters them.",
        )

    def check_of(self, path: str) -> _Check:
        """The running hash of a file."""
        with self._guard:
            return self._checks.setdefault(path, _Check(self, path))

    def location(self, path: str) -> str:
        """The address that gives a file's bytes; asked for once, then remembered.

        Raises:
            RemoteFailure: the hub has no such file, or states another size, content or commit than it listed.
        """
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        with self._guard:
            if path in self._locations:
                return self._locations[path]
        file = self.listed(path)
        url = hf_hub_url(self.repo, path, revision=self.commit, endpoint=self.endpoint)
        if file.sha256 is not None:
            # The storage address is signed and holds for a while; asking for it at every range would be
            # twice the requests. Small files come from the hub itself.
            found = get_hf_file_metadata(url, endpoint=self.endpoint)
            stated = (found.size, found.etag, found.commit_hash or self.commit)
            if stated != (file.size, file.etag, self.commit):
                raise RemoteFailure(
                    f"{path} of {self.repo}@{self.commit} is not what the hub listed: it states size, "
                    f"content and commit {stated}, the listing {(file.size, file.etag, self.commit)}",
                    "Run the same command again; the source changes while it is read.",
                )
            url = urljoin(url, found.location)
        with self._guard:
            self._locations[path] = url
        return url

    def forget_location(self, path: str) -> None:
        """Ask anew next time: signed addresses expire, and another storage host may answer."""
        with self._guard:
            self._locations.pop(path, None)

    def is_own(self, url: str) -> bool:
        """Whether an address is on the hub itself; the token is for no other host."""
        return urlsplit(url)[:2] == urlsplit(self.endpoint)[:2]

    def _header(self, name: str) -> ShardHeader | BadInput:
        path = self._path(name)
        size = self.listed(path).size
        handle = _HubFile(self, path, checked=False)
        try:
            first = bytearray(min(size, _HEADER_GUESS))
            handle.fill(memoryview(first), 0)
            length = header_length(bytes(first[:8]), size)
            whole = bytearray(8 + length)
            known = min(len(first), len(whole))
            whole[:known] = first[:known]
            handle.fill(memoryview(whole)[known:], known)
            found = header_of(bytes(whole[8:]), size, name)
        except ValueError as err:
            return unsound(self.where(name), err)
        finally:
            handle.close()
        self.check_of(path).feed(memoryview(whole), 0)
        return found


class _Check:
    """SHA-256 of a file's bytes as far as they have been read in order, by whichever readers.

    A little that is read before its turn is kept until then: a scale is read before the codes it follows.
    """

    def __init__(self, folder: HubFolder, path: str) -> None:
        self._folder, self._path = folder, path
        self._guard = threading.Lock()
        self._file = folder.listed(path)
        self._begin()

    def _begin(self) -> None:
        self._hash, self.position = self._file.new_hash(), 0
        self._early: dict[int, bytes] = {}

    def feed(self, data: memoryview, position: int) -> None:
        """Take note of bytes at a position. Raises IntegrityFailure at the last byte of a wrong file."""
        with self._guard:
            if position > self.position:
                held = sum(map(len, self._early.values()))
                if data.nbytes <= _EARLY_PIECE and held + data.nbytes <= _EARLY_BYTES:
                    self._early[position] = bytes(data)
                return
            self._take(data, position)
            while early := [at for at in self._early if at <= self.position]:
                for at in sorted(early):
                    self._take(memoryview(self._early.pop(at)), at)
            if self.position == self._file.size and self._hash.hexdigest() != self._file.etag:
                self._begin()
                raise self._folder.corrupt(self._path)

    def _take(self, data: memoryview, position: int) -> None:
        fresh = data[self.position - position :]
        self._hash.update(fresh)
        self.position += fresh.nbytes


class _HubFile(OpenFile):
    """One file read by ranges.

    A read that begins where the last one ended goes on in the same answer: each such read doubles what the
    next request asks for, so that a file read in order takes few requests and scattered reads take no byte
    too many.
    """

    def __init__(self, folder: HubFolder, path: str, *, checked: bool = True) -> None:
        self._folder, self._path = folder, path
        self._size = folder.listed(path).size
        self._check = folder.check_of(path) if checked else None
        self._answer: _Answer | None = None
        self._next, self._ahead = 0, 0

    def fill(self, view: memoryview, position: int) -> None:
        if position + view.nbytes > self._size:
            raise BadInput(f"{self._path} in {self._folder.name} ends at byte {self._size}")
        self._ahead = min(max(2 * self._ahead, view.nbytes), _READ_AHEAD) if position == self._next else 0
        whole, begin = view, position
        patience = Patience()
        while view.nbytes:
            try:
                with hub_faults(self._folder.repo, self._folder.endpoint):
                    got = self._at(position, view.nbytes).take(view)
            except PassingFault as fault:
                self._hang_up()
                self._folder.forget_location(self._path)
                patience.wait(fault)
            except BaseException:
                self._hang_up()
                raise
            else:
                patience.progress(got)
                view, position = view[got:], position + got
        self._next = position
        if self._answer is not None and self._answer.position == self._answer.end:
            self._hang_up()
        if self._check is not None:
            self._check.feed(whole, begin)

    def close(self) -> None:
        self._hang_up()

    def _at(self, position: int, count: int) -> _Answer:
        """An answer that goes on at `position`."""
        if self._answer is None or self._answer.position != position:
            self._hang_up()
            end = min(position + max(count, self._ahead), self._size)
            self._answer = _Answer(self._folder, self._path, position, end, self._size)
        return self._answer

    def _hang_up(self) -> None:
        if self._answer is not None:
            self._answer.close()
            self._answer = None


class _Answer:
    """The hub's answer to a request for bytes [begin, end) of a file, read piece by piece."""

    def __init__(self, folder: HubFolder, path: str, begin: int, end: int, size: int) -> None:
        from huggingface_hub import constants
        from huggingface_hub.utils import build_hf_headers, get_session  # type: ignore[attr-defined]

        self.position, self.end = begin, end
        url = folder.location(path)
        headers = build_hf_headers(token=None if folder.is_own(url) else False)
        # Encoded bytes could not be counted.
        headers |= {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
        session, timeout = get_session(), constants.HF_HUB_DOWNLOAD_TIMEOUT
        request = session.build_request("GET", url, headers=headers, timeout=timeout)
        self._response = session.send(request, stream=True)
        try:
            _require_range(self._response, folder, path, begin, end, size)
        except BaseException:
            self._response.close()
            raise
        self._pieces = self._response.iter_raw()
        self._piece = memoryview(b"")

    def take(self, view: memoryview) -> int:
        """Put the next bytes into `view`, at least one; returns how many."""
        while not self._piece.nbytes:
            piece = next(self._pieces, None)
            if piece is None:
                raise PassingFault(f"an answer ended at byte {self.position}, not at {self.end} as asked")
            if len(piece) > self.end - self.position:
                raise RemoteFailure(f"an answer went on after byte {self.end}, where it was asked to end")
            self._piece = memoryview(piece)
        count = min(view.nbytes, self._piece.nbytes)
        view[:count] = self._piece[:count]
        self._piece = self._piece[count:]
        self.position += count
        return count

    def close(self) -> None:
        """Let go of the connection; one whose answer is complete can be used again."""
        if self.position == self.end:
            with contextlib.suppress(Exception):
                next(self._pieces, None)  # only now does the client see the end of the answer
        self._response.close()


def _require_range(
    response: httpx.Response, folder: HubFolder, path: str, begin: int, end: int, size: int
) -> None:
    """Raise unless the answer is exactly the bytes asked for of a file of the listed size."""
    from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]

    what = f"{path} of {folder.repo}@{folder.commit}"
    if response.status_code == 416:
        raise RemoteFailure(
            f"{what} has no bytes {begin}-{end - 1}; the hub listed {size} bytes",
            "Run the same command again; the source changes while it is read.",
        )
    expired = response.status_code in (401, 403, 404, 410)
    if expired and not folder.is_own(str(response.request.url)):
        raise PassingFault(
            f"{urlsplit(str(response.request.url)).hostname} answered {response.status_code} for {what}"
        )
    hf_raise_for_status(response)
    stated = response.headers.get("Content-Range", "")
    encoding = response.headers.get("Content-Encoding", "identity")
    if response.status_code != 206 or stated != f"bytes {begin}-{end - 1}/{size}" or encoding != "identity":
        raise RemoteFailure(
            f"the server did not answer a request for bytes {begin}-{end - 1} of {size} of {what}: it sent "
            f"status {response.status_code}, Content-Range {stated!r}, Content-Encoding {encoding!r}",
            "A proxy or mirror that ignores byte ranges cannot be read from: set HF_ENDPOINT to another one, "
            "or download the checkpoint and give the folder.",
        )
