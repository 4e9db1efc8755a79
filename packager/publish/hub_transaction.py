"""The steps of a publication to a hub, each of which looks first at what is there already."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from packager.artifact import MANIFEST_NAME, read_manifest
from packager.bundle.signature import SIGNATURE_NAME
from packager.bundle.verify import VerifiedBundle
from packager.checkpoint.hub_faults import WRITE_AGAIN, PassingFault
from packager.errors import RemoteFailure, UsageProblem
from packager.publish.hub_checks import HubSettings, HubView, remote_tree

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo, RepoFile

HUB_OWN_FILES = frozenset({".gitattributes"})
"""Files that a hub puts into every repository."""
DEPRECATED = "deprecated-"
"""What stands before the name of a deprecated tag in the tag that marks it."""


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
    private: bool = False
    gated: str | None = None
    collections: tuple[str, ...] = ()
    deprecated: str | None = None
    warnings: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """For people, 80 columns where names allow it."""
        marks = ["private"] * self.private + [f"gated: {self.gated}"] * bool(self.gated)
        lines = [
            f"published {self.repo_id}" + (f" ({', '.join(marks)})" if marks else ""),
            f"bundle   {self.digest}",
            f"commit   {self.revision}, tag {self.tag}",
            f"files    {self.files}, {self.bytes / 1e9:.3f} GB"
            + (" (was there already, nothing was sent)" if self.already_there else ""),
            f"where    {self.url}",
        ]
        lines += [f"in       {slug}" for slug in self.collections]
        lines += [f"marked   {self.deprecated} as deprecated"] if self.deprecated else []
        return [*lines, f"check it with: packager verify hf://{self.repo_id}@{self.tag}"]


@dataclass(frozen=True)
class LocalFile:
    """A local file as the hub will list it."""

    path: Path
    size: int
    sha256: str


@dataclass(frozen=True)
class Prepared:
    """A publication that nothing stands in the way of."""

    verified: VerifiedBundle
    files: dict[str, LocalFile]
    """By path in the repository."""
    settings: HubSettings
    view: HubView
    warnings: tuple[str, ...]


def title_of(digest: str, main: str = "") -> str:
    """Of the pull request, by which a later attempt finds it: the bundle, and the commit of main it is for.

    One that began at an older main cannot take away what main gained since.
    """
    return f"Publish bundle {short_digest(digest)} onto {main[:12]}"


def short_digest(digest: str) -> str:
    """The first 12 digits."""
    return digest.removeprefix("sha256:")[:12]


def local_files(bundle: Path) -> dict[str, LocalFile]:
    """What a sealed bundle is to look like on a hub: its files, its manifest, its signature if it has one."""
    manifest = read_manifest(bundle)
    files = {e.path: LocalFile(bundle / e.path, e.size, e.sha256) for e in manifest.files}
    for name in (MANIFEST_NAME, SIGNATURE_NAME):
        if (bundle / name).is_file():
            data = (bundle / name).read_bytes()
            files[name] = LocalFile(bundle / name, len(data), hashlib.sha256(data).hexdigest())
    return files


def differences(files: Mapping[str, LocalFile], there: Mapping[str, RepoFile]) -> list[str]:
    """How a remote tree differs from the bundle, one line a file; empty: it is the bundle."""
    lines = [f"{p}: {'differs' if p in there else 'missing'}" for p in files if p not in there
             or not _same(files[p], there[p])]  # fmt: skip
    return lines + [f"{p}: stray" for p in there if p not in files and p not in HUB_OWN_FILES]


def _same(local: LocalFile, remote: RepoFile) -> bool:
    """Compared by SHA-256 where the hub keeps it (LFS, Xet), else by git's object id of the content."""
    if remote.size != local.size:
        return False
    if remote.lfs is not None:
        return remote.lfs.sha256 == local.sha256
    return remote.blob_id == git_oid(local.path)


def git_oid(path: Path) -> str:
    """Git's object id of a small file's content."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


class Transaction:
    """One bundle on its way to one repository; `run` may be called again after any fault."""

    def __init__(self, api: HfApi, prepared: Prepared, progress: Callable[[str], None]) -> None:
        self.api, self.progress = api, progress
        self.settings, self.repo_id = prepared.settings, prepared.settings.repo_id
        self.files = prepared.files
        self.in_collections = prepared.view.in_collections
        self.digest, self.warnings = prepared.verified.digest, prepared.warnings

    def run(self) -> Published:
        """All steps in order.

        Raises:
            PassingFault: run it again; RemoteFailure, UsageProblem: do not. And what the client raises.
        """
        repo, tag = self.repo_id, self.settings.tag
        info = self._repository()
        main = str(info.sha)
        tagged = self._tagged(tag)
        already = not differences(self.files, remote_tree(self.api, repo, "main"))
        if tagged is not None and (tagged != main or not already):
            raise UsageProblem(
                f"the tag {tag} of {repo} names another content (commit {tagged})",
                "Choose another tag with --tag; a published tag is never moved.",
            )
        if not already:
            main = self._replace_main(main)
        if tagged is None:
            message = f"Bundle {self.digest}"
            self.api.create_tag(repo, tag=tag, tag_message=message, revision=main, exist_ok=True)
            self.progress(f"tag {tag} names commit {main[:12]}")
        for slug in sorted(set(self.settings.collections) - self.in_collections):
            self.api.add_collection_item(slug, repo, "model", exists_ok=True)
            self.progress(f"in the collection {slug}")
        if self.settings.deprecate:
            self._deprecate(self.settings.deprecate)
        total = sum(file.size for file in self.files.values())
        return Published(
            repo, self.digest, main, tag, len(self.files), total, f"{self.api.endpoint}/{repo}", already,
            bool(info.private), self.settings.gated or info.gated or None, self.settings.collections,
            self.settings.deprecate, self.warnings,
        )  # fmt: skip

    def _repository(self) -> ModelInfo:
        """The repository, made if it is not there; gated, if asked, before it holds anything."""
        from huggingface_hub.errors import RepositoryNotFoundError

        repo, wanted = self.repo_id, self.settings
        try:
            info = self.api.model_info(repo, revision="main")
        except RepositoryNotFoundError:
            self.progress(f"making {repo}{' (private)' if wanted.private else ''}")
            self.api.create_repo(repo, private=wanted.private, exist_ok=True)
            info = self.api.model_info(repo, revision="main")
        if wanted.gated and info.gated != wanted.gated:
            self.progress(f"gating {repo} ({wanted.gated})")
            self.api.update_repo_settings(repo, gated=cast("Literal['auto', 'manual']", wanted.gated))
        return info

    def _replace_main(self, main: str) -> str:
        number = self._pull_request(main)
        branch = f"refs/pr/{number}"
        self._upload(branch, number)
        different = differences(self.files, remote_tree(self.api, self.repo_id, branch))
        if different:
            raise PassingFault(
                f"{self.repo_id} at {branch} is not the bundle:{_listed(different)}", WRITE_AGAIN
            )
        self.progress(f"pull request {number}: {len(self.files)} files are there as sealed; merging")
        if self._head("main") != main:
            raise PassingFault(f"main of {self.repo_id} changed meanwhile", WRITE_AGAIN)
        if self.api.get_discussion_details(self.repo_id, number).status == "draft":
            self.api.change_discussion_status(self.repo_id, number, "open")
        self.api.merge_pull_request(self.repo_id, number)
        different = differences(self.files, remote_tree(self.api, self.repo_id, "main"))
        if different:
            raise RemoteFailure(
                f"main of {self.repo_id} is not the bundle after merging:{_listed(different)}",
                f"Somebody else changed main in that moment: see its history, {self.api.endpoint}/"
                f"{self.repo_id}/commits/main. The same command run again makes main the bundle alone.",
            )
        return self._head("main")

    def _pull_request(self, main: str) -> int:
        found = self.api.get_repo_discussions(self.repo_id, discussion_type="pull_request")
        usable, title = None, title_of(self.digest, main)
        for discussion in list(found):
            if discussion.status not in ("draft", "open"):
                continue
            if discussion.title == title:
                usable = discussion.num
            elif discussion.title.startswith(title_of(self.digest)):
                self.api.change_discussion_status(
                    self.repo_id, discussion.num, "closed", comment=f"main is at {main} now."
                )
        if usable is not None:
            return usable
        description = f"Bundle {self.digest}; see bundle.lock."
        return self.api.create_pull_request(self.repo_id, title=title, description=description).num

    def _upload(self, branch: str, number: int) -> None:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        head = self._head(branch)
        there = remote_tree(self.api, self.repo_id, branch)
        if ".gitignore" in there:
            # What it names would be left out of the upload, without a word.
            head = self.api.create_commit(
                self.repo_id,
                [CommitOperationDelete(".gitignore", is_folder=False)],
                commit_message="Remove .gitignore",
                revision=branch,
                parent_commit=head,
            ).oid
            del there[".gitignore"]
        changed = [p for p, file in self.files.items() if p not in there or not _same(file, there[p])]
        stray = [p for p in there if p not in self.files and p not in HUB_OWN_FILES]
        if not changed and not stray:
            return
        size = sum(self.files[path].size for path in changed)
        self.progress(f"pull request {number}: uploading {len(changed)} files, {size / 1e9:.2f} GB")
        additions = []
        for path in changed:
            addition = CommitOperationAdd(path, self.files[path].path)
            # The manifest knows the hash already; without it the client would read every file again.
            addition.upload_info.sha256 = bytes.fromhex(self.files[path].sha256)
            additions.append(addition)
        self.api.create_commit(
            self.repo_id,
            [*additions, *(CommitOperationDelete(path, is_folder=False) for path in stray)],
            commit_message=f"Publish bundle {short_digest(self.digest)}",
            revision=branch,
            parent_commit=head,
        )

    def _deprecate(self, old: str) -> None:
        """Say that a tag should not be used any more: a mark for machines, a discussion for people.

        A tag's message cannot be changed, its files are signed and stay as they are. So a second tag
        `deprecated-OLD` names the same commit and carries the reason, and an open discussion tells it.
        """
        commit = self._head(old)
        reason = self.settings.reason or "it was replaced"
        mark, title = f"{DEPRECATED}{old}", f"{old} is deprecated"
        if self._tagged(mark) is None:
            message = f"{old} is deprecated: {reason}. Use {self.settings.tag}."
            self.api.create_tag(self.repo_id, tag=mark, tag_message=message, revision=commit, exist_ok=True)
        found = self.api.get_repo_discussions(self.repo_id, discussion_type="discussion")
        if not any(discussion.title == title for discussion in found):
            self.api.create_discussion(
                self.repo_id,
                title=title,
                description=f"`{old}` (commit {commit}) is deprecated: {reason}.\n\n"
                f"Use `{self.settings.tag}` (bundle {self.digest}). The files of `{old}` stay as they are; "
                f"the tag `{mark}` marks them.",
            )
        self.progress(f"{old} is marked as deprecated ({mark})")

    def _head(self, revision: str) -> str:
        return str(self.api.repo_info(self.repo_id, revision=revision).sha)

    def _tagged(self, tag: str) -> str | None:
        tags = self.api.list_repo_refs(self.repo_id).tags
        named = next((found for found in tags if found.name == tag), None)
        # Resolved through the tag itself: an annotated tag's own object is not the commit.
        return self._head(tag) if named else None


def _listed(lines: list[str]) -> str:
    """At most ten, each on a line of its own."""
    more = f"\n  and {len(lines) - 10} more" if len(lines) > 10 else ""
    return "".join(f"\n  {line}" for line in lines[:10]) + more
