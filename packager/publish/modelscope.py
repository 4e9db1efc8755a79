"""A bundle on ModelScope: `ms://ORG/NAME`, through ModelScope's own SDK (modelscope_hub).

The SDK's `upload_folder` commits in batches, so that a run cut short leaves half a bundle on master, and it
keeps its bookkeeping in the folder it uploads. Here its client is used one level below: blobs first, those
that the hub has are left out; then one commit that names every file, which is all that touches master; then
the tree is compared with the manifest and the tag made. The same command run again, after any fault, goes on
from there. ModelScope has no pull requests and its commits no expected parent: someone else's commit in the
same second is not prevented, but seen by the comparison.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from packager.bundle.verify import VerifiedBundle
from packager.checkpoint.hub_faults import PassingFault, Patience
from packager.errors import BadInput, RemoteFailure, UsageProblem
from packager.publish.hub_transaction import LocalFile, git_oid, local_files, short_digest
from packager.publish.preflight import Limits, preflight

if TYPE_CHECKING:
    from modelscope_hub import FileInfo, HubApi

LIMITS = Limits(
    name="ModelScope",
    file_bytes=100 << 30,
    advised_file_bytes=100 << 30,
    files_a_folder=50_000,
    advised_files=100_000,
)
"""What the hub states, and its SDK only warns of (modelscope_hub/constants.py)."""
_MAIN = "master"
_KIND = "model"
_HUB_OWN_FILES = frozenset({".gitattributes"})
_TOKEN = "Get one at modelscope.cn/my/myaccesstoken and set MODELSCOPE_API_TOKEN, or run `modelscope login`."
_AGAIN = "Run the same command again: it goes on where it stopped; master changes in one commit at the end."


@dataclass(frozen=True)
class PublishedThere:
    """A bundle on ModelScope."""

    repo_id: str
    tag: str
    digest: str
    """Of the bundle's manifest: its identity on every hub."""
    files: int
    bytes: int
    uploaded_bytes: int
    url: str
    already_there: bool
    """Nothing had to be committed."""


def publish(
    bundle: Path,
    repo_id: str,
    *,
    endpoint: str | None = None,
    token: str | None = None,
    tag: str | None = None,
    private: bool = False,
    public_key: Path | None = None,
    attempts: int = 4,
    wait_s: float = 2.0,
    progress: Callable[[str], None],
) -> PublishedThere:
    """Publish a verified bundle to `repo_id` on ModelScope.

    Args:
        endpoint: None: MODELSCOPE_ENDPOINT or modelscope.cn.
        token: None: MODELSCOPE_API_TOKEN or what `modelscope login` left.
        tag: None: `bundle-<first 12 digits of the digest>`.
        attempts: how often a passing fault (5xx, 429, lost connection) is met with another try.
        wait_s: seconds before the second try; doubled before each later one.

    Raises:
        BadInput, IntegrityFailure, GateFailed, UsageProblem: as `preflight`; a tag that names other content.
        RemoteFailure: the hub refuses, cannot be reached, or holds other bytes than were sent.
    """
    verified = preflight(bundle, public_key, progress, limits=LIMITS)
    api = _api(endpoint, token)
    attempt = _Transaction(api, bundle, verified, repo_id, tag, private, progress)
    patience = Patience(attempts, wait_s, progress)
    while True:
        try:
            with _faults(repo_id):
                return attempt.run()
        except PassingFault as fault:
            patience.wait(fault)


def download(repo_id: str, revision: str | None, target: Path, *, endpoint: str | None = None) -> Path:
    """A repository's files in the folder `target`, fetched as far as they are not there.

    Raises:
        RemoteFailure: no such repository or revision, or no hub. UsageProblem: the SDK is not installed.
    """
    api = _api(endpoint, None)
    with _faults(repo_id):
        return Path(api.download_repo(repo_id, _KIND, revision=revision, local_dir=target))


class _Transaction:
    """One bundle on its way to one repository; `run` may be called again after any fault."""

    def __init__(
        self,
        api: HubApi,
        bundle: Path,
        verified: VerifiedBundle,
        repo_id: str,
        tag: str | None,
        private: bool,
        progress: Callable[[str], None],
    ) -> None:
        self.api, self.repo_id, self.private, self.progress = api, repo_id, private, progress
        self.verified = verified
        self.short = short_digest(verified.digest)
        self.tag = tag or f"bundle-{self.short}"
        self.files = local_files(bundle)
        self.uploaded = 0

    def run(self) -> PublishedThere:
        self.api.whoami()
        self._create()
        tagged = self.tag in _tags(self.api, self.repo_id)
        if tagged and self._differences(self.tag):
            raise UsageProblem(
                f"the tag {self.tag} of {self.repo_id} names another content",
                "Choose another tag with --tag; a published tag is never moved.",
            )
        different = self._differences(_MAIN)
        if different:
            self._commit()
            left = self._differences(_MAIN)
            if left:
                raise RemoteFailure(
                    f"master of {self.repo_id} is not the bundle:\n  " + "\n  ".join(left),
                    "Somebody else changed it at the same time; look at its history, then run again.",
                )
        if not tagged:
            self.api.create_repo_tag(self.repo_id, _KIND, self.tag, revision=_MAIN)
        return PublishedThere(
            repo_id=self.repo_id,
            tag=self.tag,
            digest=self.verified.digest,
            files=len(self.files),
            bytes=sum(file.size for file in self.files.values()),
            uploaded_bytes=self.uploaded,
            url=f"{self.api.legacy.endpoint}/models/{self.repo_id}",
            already_there=not different,
        )

    def _create(self) -> None:
        from modelscope_hub import errors

        if self.api.repo_exists(self.repo_id, _KIND):
            return
        licence = self.verified.lock.license
        try:
            visibility = "private" if self.private else "public"
            self.api.create_repo(self.repo_id, _KIND, visibility=visibility, license=licence)
        except errors.AlreadyExistsError:
            pass  # by an attempt whose answer was lost

    def _commit(self) -> None:
        from modelscope_hub.constants import COMMIT_MAX_ACTIONS_PER_REQUEST

        there = self._tree(_MAIN)
        changed = {p: f for p, f in self.files.items() if not _same(f, there.get(p))}
        stray = [p for p in there if p not in self.files and p not in _HUB_OWN_FILES]
        if len(changed) + len(stray) > COMMIT_MAX_ACTIONS_PER_REQUEST:
            raise BadInput(
                f"{len(changed) + len(stray)} files do not fit into one commit on ModelScope "
                f"(at most {COMMIT_MAX_ACTIONS_PER_REQUEST})",
                "Write fewer, larger shards (quantize.shard_bytes).",
            )
        large = {p: f for p, f in changed.items() if _is_lfs(p, f.size)}
        self._upload(large)
        actions = [_action(path, file, lfs=path in large) for path, file in changed.items()]
        actions += [{"action": "delete", "path": path, "type": "normal"} for path in stray]
        self.progress(f"{self.repo_id}: one commit of {len(actions)} files")
        self.api.legacy.create_commit(self.repo_id, _KIND, actions, f"Publish bundle {self.short}", _MAIN)

    def _upload(self, files: dict[str, LocalFile]) -> None:
        blobs = {file.sha256: file for file in files.values()}
        if not blobs:
            return
        wanted = [{"oid": oid, "size": file.size} for oid, file in blobs.items()]
        places = self.api.legacy.validate_blobs(self.repo_id, _KIND, wanted)
        for oid, file in blobs.items():
            url = places.get(oid)
            if url is None:
                continue  # the hub has it
            self.progress(f"{self.repo_id}: uploading {file.path.name} ({file.size / 1e9:.2f} GB)")
            with file.path.open("rb") as stream:
                self.api.legacy.upload_blob(url, stream, file.size)
            self.uploaded += file.size

    def _tree(self, revision: str) -> dict[str, FileInfo]:
        listed = self.api.list_repo_files(self.repo_id, _KIND, revision=revision)
        return {entry.path: entry for entry in listed if entry.type != "tree"}

    def _differences(self, revision: str) -> list[str]:
        """How the remote tree differs from the bundle, one line a file; empty: it is the bundle."""
        there = self._tree(revision)
        lines = [f"{path}: missing" for path in self.files if path not in there]
        lines += [f"{p}: differs" for p, f in self.files.items() if p in there and not _same(f, there[p])]
        return lines + [f"{p}: stray" for p in there if p not in self.files and p not in _HUB_OWN_FILES]


def _tags(api: HubApi, repo_id: str) -> set[str]:
    _, tags = api.legacy.list_revisions_detail(repo_id, _KIND)
    return {str(tag.get("Revision")) for tag in tags}


def _same(local: LocalFile, remote: FileInfo | None) -> bool:
    """Compared by SHA-256 where the hub says it, else by git's object id of the content."""
    if remote is None or remote.size != local.size:
        return False
    if remote.sha256:
        return str(remote.sha256) == local.sha256
    return str(remote.blob_id) == git_oid(local.path)


def _is_lfs(path: str, size: int) -> bool:
    """The SDK's rule (modelscope_hub/_upload.py): what the hub itself reads stays in the commit."""
    from modelscope_hub import constants

    name = PurePosixPath(path)
    if name.name.upper() in constants.UPLOAD_INLINE_METADATA_PATHS:
        return False
    return size > constants.UPLOAD_LFS_FORCE_THRESHOLD_BYTES or name.suffix in constants.MODEL_LFS_SUFFIX


def _action(path: str, file: LocalFile, *, lfs: bool) -> dict[str, Any]:
    content = "" if lfs else base64.b64encode(file.path.read_bytes()).decode()
    return {
        "action": "create",  # of a path that is there: it is replaced
        "path": path,
        "type": "lfs" if lfs else "normal",
        "size": file.size,
        "sha256": file.sha256 if lfs else "",
        "content": content,
        "encoding": "" if lfs else "base64",
    }


def _api(endpoint: str | None, token: str | None) -> HubApi:
    try:
        from modelscope_hub import HubApi
    except ImportError:
        raise UsageProblem(
            "ms:// needs ModelScope's SDK, which is not installed", "pip install 'moe-packager[hubs]'"
        ) from None
    return HubApi(endpoint=endpoint, token=token)


@contextmanager
def _faults(repo_id: str) -> Iterator[None]:
    """Turn what the SDK raises into PassingFault, RemoteFailure or UsageProblem."""
    import requests
    from modelscope_hub import errors

    try:
        yield
    except errors.AuthenticationError as err:
        raise UsageProblem(f"ModelScope does not know who is asking: {_short(err)}", _TOKEN) from None
    except errors.NotExistError as err:
        raise RemoteFailure(
            f"ModelScope has no {repo_id}, or it is private: {_short(err)}", f"Check the name. {_TOKEN}"
        ) from None
    except errors.PermissionDeniedError as err:
        raise RemoteFailure(f"ModelScope refuses {repo_id}: {_short(err)}", _TOKEN) from None
    except errors.RateLimitError as err:
        asked = float(err.retry_after or 0)
        raise PassingFault(
            f"ModelScope is asked too often: {_short(err)}", _AGAIN, asked_wait_s=asked
        ) from None
    except errors.HubError as err:
        kind = PassingFault if err.retryable else RemoteFailure
        raise kind(f"ModelScope, {repo_id}: {_short(err)}", _AGAIN) from None
    except requests.exceptions.RequestException as err:
        raise PassingFault(f"the connection to ModelScope broke: {_short(err)}", _AGAIN) from None


def _short(err: Exception) -> str:
    return " ".join(str(err).split())[:200] or type(err).__name__
