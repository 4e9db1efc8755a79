"""Publishing to a hub as one transaction: main changes once, from what it was to the whole bundle.

    preflight  the bundle verifies, its gates passed, it is licensed and signed, the token works
    request    a draft pull request named after the bundle's digest (or the one left by an earlier attempt)
    upload     one commit to refs/pr/N; contents the hub has already are not sent again
    compare    the remote tree against the manifest: every path, size and digest
    merge      the only step that touches main
    tag        names the commit

Each step looks first at what the hub has, so the same command run again, after any fault, goes on from there.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from packager.artifact import MANIFEST_NAME, read_manifest
from packager.bundle.signature import SIGNATURE_NAME
from packager.bundle.verify import VerifiedBundle
from packager.checkpoint.hub_faults import WRITE_AGAIN, PassingFault, Patience, hub_faults
from packager.errors import RemoteFailure, UsageProblem
from packager.publish.preflight import Limits, preflight

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

HUB_OWN_FILES = frozenset({".gitattributes"})
"""Files that a hub puts into every repository."""


@dataclass(frozen=True)
class Published:
    """A bundle on a hub."""

    repo_id: str
    digest: str
    """Of the bundle: the same wherever it is published."""
    revision: str
    """Commit oid of main."""
    tag: str
    files: int
    bytes: int
    url: str
    already_there: bool
    """Nothing had to be uploaded or merged."""


@dataclass(frozen=True)
class _File:
    """A local file as the hub will list it."""

    path: Path
    size: int
    sha256: str


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
) -> Published:
    """Publish a verified bundle to `repo_id` on a hub.

    Args:
        endpoint: hub address; None: the client's own (HF_ENDPOINT or huggingface.co).
        token: None: the token that `hf auth login` or HF_TOKEN provides.
        tag: None: `bundle-<first 12 digits of the digest>`.
        attempts: how often a passing fault (5xx, 429, lost connection) is met with another try.
        wait_s: seconds before the second try; doubled before each later one.

    Raises:
        BadInput, IntegrityFailure, GateFailed, UsageProblem: as `preflight`; a tag that names other content.
        RemoteFailure: the hub refuses, cannot be reached, or holds other bytes than were sent.
    """
    from huggingface_hub import HfApi

    verified = preflight(bundle, public_key, progress, limits=Limits())
    api = HfApi(endpoint=endpoint, token=token)
    transaction = _Transaction(api, bundle, verified, repo_id, tag, private, progress)
    patience = Patience(attempts, wait_s, progress)
    while True:
        try:
            with hub_faults(repo_id, api.endpoint, writing=True):
                return transaction.run()
        except PassingFault as fault:
            patience.wait(fault)


def check_repo_id(text: str) -> str:
    """`text` if it can name a repository with its owner. Raises UsageProblem otherwise."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", text, re.ASCII):
        raise UsageProblem(f"{text!r} does not name a repository", "Write hf://organisation/name.")
    return text


def download(repo_id: str, revision: str | None, *, endpoint: str | None = None) -> Path:
    """A repository in the hub cache, downloaded as far as it is not there.

    Raises:
        UsageProblem: no such name; RemoteFailure: no such repository or revision, or no hub.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import LocalEntryNotFoundError

    api = HfApi(endpoint=endpoint)
    with hub_faults(repo_id, api.endpoint):
        try:
            return Path(api.snapshot_download(check_repo_id(repo_id), revision=revision))
        except LocalEntryNotFoundError as err:
            raise RemoteFailure(
                f"{repo_id} can neither be downloaded from {api.endpoint} nor is it in the cache",
                "Check the network and the name.",
            ) from err


class _Transaction:
    """One bundle on its way to one repository; `run` may be called again after any fault."""

    def __init__(
        self,
        api: HfApi,
        bundle: Path,
        verified: VerifiedBundle,
        repo_id: str,
        tag: str | None,
        private: bool,
        progress: Callable[[str], None],
    ) -> None:
        self.api, self.repo_id, self.private, self.progress = api, repo_id, private, progress
        self.verified = verified
        short = verified.digest.removeprefix("sha256:")[:12]
        self.tag = tag or f"bundle-{short}"
        self.title = f"Publish bundle {short}"
        self.files = _local_files(bundle)

    def run(self) -> Published:
        self.api.whoami()
        self.api.create_repo(self.repo_id, private=self.private, exist_ok=True)
        main = self._head("main")
        tagged = self._tagged()
        already = self._differences("main") == []
        if tagged is not None and (tagged != main or not already):
            raise UsageProblem(
                f"the tag {self.tag} of {self.repo_id} names another content (commit {tagged})",
                "Choose another tag with --tag; a published tag is never moved.",
            )
        if not already:
            main = self._replace_main(main)
        if tagged is None:
            self.api.create_tag(self.repo_id, tag=self.tag, revision=main, exist_ok=True)
        url = f"{self.api.endpoint}/{self.repo_id}"
        total = sum(file.size for file in self.files.values())
        return Published(
            self.repo_id, self.verified.digest, main, self.tag, len(self.files), total, url, already
        )

    def _replace_main(self, main: str) -> str:
        number = self._pull_request()
        branch = f"refs/pr/{number}"
        self.progress(f"pull request {number}: uploading")
        self._upload(branch)
        different = self._differences(branch)
        if different:
            raise PassingFault(
                f"{self.repo_id} at {branch} is not the bundle:\n  " + "\n  ".join(different), WRITE_AGAIN
            )
        self.progress(f"pull request {number}: {len(self.files)} files are there as sealed; merging")
        if self._head("main") != main:
            raise PassingFault(f"main of {self.repo_id} changed meanwhile", WRITE_AGAIN)
        if self.api.get_discussion_details(self.repo_id, number).status == "draft":
            self.api.change_discussion_status(self.repo_id, number, "open")
        self.api.merge_pull_request(self.repo_id, number)
        different = self._differences("main")
        if different:
            raise RemoteFailure(
                f"main of {self.repo_id} is not the bundle after merging:\n  " + "\n  ".join(different),
                "Somebody else changed main at the same time; look at its history.",
            )
        return self._head("main")

    def _pull_request(self) -> int:
        found = self.api.get_repo_discussions(self.repo_id, discussion_type="pull_request")
        for discussion in found:
            if discussion.title == self.title and discussion.status in ("draft", "open"):
                return discussion.num
        description = f"Bundle {self.verified.digest}; see bundle.lock."
        return self.api.create_pull_request(self.repo_id, title=self.title, description=description).num

    def _upload(self, branch: str) -> None:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        head = self._head(branch)
        there = self._tree(branch)
        changed = [p for p, file in self.files.items() if not _same(file, there.get(p))]
        stray = [p for p in there if p not in self.files and p not in HUB_OWN_FILES]
        if not changed and not stray:
            return
        additions = []
        for path in changed:
            addition = CommitOperationAdd(path, self.files[path].path)
            # The manifest knows the hash already; without it the client would read every file again.
            addition.upload_info.sha256 = bytes.fromhex(self.files[path].sha256)
            additions.append(addition)
        self.api.create_commit(
            self.repo_id,
            [*additions, *(CommitOperationDelete(path, is_folder=False) for path in stray)],
            commit_message=self.title,
            revision=branch,
            parent_commit=head,
        )

    def _head(self, revision: str) -> str:
        return str(self.api.repo_info(self.repo_id, revision=revision).sha)

    def _tagged(self) -> str | None:
        tags = self.api.list_repo_refs(self.repo_id).tags
        named = next((tag for tag in tags if tag.name == self.tag), None)
        # Resolved through the tag itself: an annotated tag's own object is not the commit.
        return self._head(self.tag) if named else None

    def _tree(self, revision: str) -> dict[str, RepoFile]:
        from huggingface_hub.hf_api import RepoFile

        listed = self.api.list_repo_tree(self.repo_id, revision=revision, recursive=True)
        return {entry.path: entry for entry in listed if isinstance(entry, RepoFile)}

    def _differences(self, revision: str) -> list[str]:
        """How the remote tree differs from the bundle, one line a file; empty: it is the bundle."""
        there = self._tree(revision)
        lines = [f"{p}: {'differs' if p in there else 'missing'}" for p in self.files if p not in there
                 or not _same(self.files[p], there[p])]  # fmt: skip
        return lines + [f"{p}: stray" for p in there if p not in self.files and p not in HUB_OWN_FILES]


def _local_files(bundle: Path) -> dict[str, _File]:
    manifest = read_manifest(bundle)
    files = {e.path: _File(bundle / e.path, e.size, e.sha256) for e in manifest.files}
    for name in (MANIFEST_NAME, SIGNATURE_NAME):
        data = (bundle / name).read_bytes()
        files[name] = _File(bundle / name, len(data), hashlib.sha256(data).hexdigest())
    return files


def _same(local: _File, remote: RepoFile | None) -> bool:
    """Compared by SHA-256 where the hub keeps it (LFS, Xet), else by git's object id of the content."""
    if remote is None or remote.size != local.size:
        return False
    if remote.lfs is not None:
        return remote.lfs.sha256 == local.sha256
    data = local.path.read_bytes()
    return remote.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
