"""`--dry-run`: every call that a publication would make, without making one that writes.

A test holds this list against the requests that a publication really makes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from packager.publish.hub import Patiently, Request, publication
from packager.publish.hub_checks import remote_tree
from packager.publish.hub_transaction import (
    DEPRECATED,
    HUB_OWN_FILES,
    Prepared,
    differences,
    title_of,
)

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_PREUPLOAD_BATCH = 256
"""Files that the client asks about in one request (`_commit_api.py`)."""


@dataclass(frozen=True)
class Call:
    """One request, or one kind of request to storage."""

    method: str
    path: str
    purpose: str
    bytes: int = 0
    """Of file contents; an upper bound: contents that the hub has are not sent."""

    @property
    def writes(self) -> bool:
        """Changes something on the hub, if only a draft."""
        asks = self.path.endswith(("/validate-yaml", "/objects/batch")) or "/preupload/" in self.path
        return self.method != "GET" and not asks


@dataclass(frozen=True)
class DryRun:
    """What a publication would do."""

    repo_id: str
    digest: str
    tag: str
    hub: str
    asked: tuple[Request, ...]
    """Requests that were made to find out, all of them GET."""
    calls: tuple[Call, ...]
    """In order. Whose path holds `{N}` or `{COMMIT}` names a pull request or commit that is yet to be."""
    files: int
    bytes: int
    """Of the files that are not on main as they should be."""
    warnings: tuple[str, ...]
    not_told: tuple[str, ...]

    def lines(self) -> list[str]:
        """For people, 80 columns where names allow it."""
        base = f"/api/models/{self.repo_id}"
        lines = [f"dry run: {self.repo_id} on {self.hub}, tag {self.tag}", f"bundle {self.digest}", ""]
        if self.asked:
            lines.append(f"asked now ({len(self.asked)} requests, none writes):")
            lines += [f"  {r.method:<5} {r.path.replace(base, '…')}" for r in self.asked]
        else:
            lines.append("not asked: the hub. The list is that for a repository which has to be made.")
        writing = sum(call.writes for call in self.calls)
        lines += ["", f"would be called ({len(self.calls)} calls, {writing} write; … is {base}):"]
        for call in self.calls:
            size = f", up to {call.bytes / 1e9:.3f} GB" if call.bytes else ""
            mark = "*" if call.writes else " "
            lines.append(f" {mark}{call.method:<5} {call.path.replace(base, '…'):<34} {call.purpose}{size}")
        lines += ["", f"* writes. {self.files} files, {self.bytes / 1e9:.3f} GB are not on main yet."]
        lines += [f"the hub does not tell {what}" for what in self.not_told]
        return lines


def dry_run(
    bundle: Path,
    repo_id: str,
    *,
    endpoint: str | None = None,
    token: str | None = None,
    offline: bool = False,
    public_key: Path | None = None,
    progress: Callable[[str], None],
    **settings: object,
) -> DryRun:
    """The calls that `publish` would make with the same arguments.

    Args:
        offline: ask the hub nothing; the calls are those for a repository that has to be made.

    Raises:
        As `publish`: what stands in the way is told here too.
    """
    with publication(
        bundle, repo_id, endpoint=endpoint, token=token, public_key=public_key, ask=not offline,
        progress=progress, **settings,  # type: ignore[arg-type]
    ) as run:  # fmt: skip
        calls = _calls(run.api, run.prepared, run.patiently)
        prepared = run.prepared
        changed = _changed(prepared, differences(prepared.files, prepared.view.tree))
        return DryRun(
            repo_id,
            prepared.verified.digest,
            prepared.settings.tag,
            run.api.endpoint,
            tuple(run.requests),
            tuple(calls),
            len(changed),
            sum(changed.values()),
            prepared.warnings,
            tuple(prepared.view.not_told),
        )


def _changed(prepared: Prepared, different: list[str]) -> dict[str, int]:
    """Paths that have to be sent, with their sizes in bytes."""
    names = {line.rpartition(":")[0] for line in different}
    return {path: file.size for path, file in prepared.files.items() if path in names}


def _calls(api: HfApi, prepared: Prepared, patiently: Patiently) -> list[Call]:
    view, wanted = prepared.view, prepared.settings
    base = f"/api/models/{wanted.repo_id}"
    calls = [Call("GET", f"{base}/revision/main", "is the repository there")]
    if not view.exists:
        kind = "private " if wanted.private else ""
        calls += [
            Call("POST", "/api/repos/create", f"make the {kind}repository"),
            Call("GET", f"{base}/revision/main", "head of main"),
        ]
    if wanted.gated and wanted.gated != view.gated:
        calls.append(Call("PUT", f"{base}/settings", f"gated: {wanted.gated}"))
    calls.append(Call("GET", f"{base}/refs", "is the tag free"))
    if view.tagged:
        calls.append(Call("GET", f"{base}/revision/{wanted.tag}", "which commit the tag names"))
    calls.append(Call("GET", f"{base}/tree/main", "what is on main"))
    commit = view.head or "{COMMIT}"
    if not view.exists or differences(prepared.files, view.tree):
        commit = "{COMMIT}"
        calls += patiently(lambda: _replacing_main(api, prepared, base))
    if not view.tagged:
        calls.append(Call("POST", f"{base}/tag/{commit}", f"tag {wanted.tag}"))
    calls += [
        Call("POST", f"/api/collections/{slug}/items", "add to the collection")
        for slug in wanted.collections
        if slug not in view.in_collections
    ]
    if wanted.deprecate:
        old = f"{base}/revision/{wanted.deprecate}"
        mark = f"{DEPRECATED}{wanted.deprecate}"
        marked = mark in view.tags
        calls += [Call("GET", old, "what it names"), Call("GET", f"{base}/refs", "is it marked")]
        calls += (
            [Call("GET", f"{base}/revision/{mark}", "is it marked")]
            if marked
            else [Call("POST", f"{base}/tag/{{COMMIT}}", f"tag {mark}")]
        )
        calls.append(Call("GET", f"{base}/discussions", "is it told"))
        if not marked:
            calls += [
                Call("POST", f"{base}/discussions", f"tell that {wanted.deprecate} is deprecated"),
                Call("GET", f"{base}/discussions/{{N}}", "it, as it stands"),
            ]
    return calls


def _replacing_main(api: HfApi, prepared: Prepared, base: str) -> list[Call]:
    view, repo = prepared.view, prepared.settings.repo_id
    number, there, unknown = "{N}", view.tree, True
    closed = []
    title, any_title = (title_of(prepared.verified.digest, main) for main in (view.head or "", ""))
    if view.exists:
        for found in api.get_repo_discussions(repo, discussion_type="pull_request"):
            if found.status not in ("draft", "open") or not found.title.startswith(any_title):
                continue
            if found.title == title:
                number, unknown = str(found.num), False
                there = remote_tree(api, repo, f"refs/pr/{number}")
            else:
                path = f"{base}/discussions/{found.num}/status"
                closed.append(Call("POST", path, "close one that began at an older main"))
    request, branch = f"{base}/discussions/{number}", f"refs%2Fpr%2F{number}"
    calls = [Call("GET", f"{base}/discussions", "a pull request left by an earlier attempt"), *closed]
    if unknown:
        calls += [
            Call("POST", f"{base}/discussions", "open a draft pull request"),
            Call("GET", request, "it, as it stands"),
        ]
    calls += [
        Call("GET", f"{base}/revision/{branch}", "its head"),
        Call("GET", f"{base}/tree/{branch}", "what it holds"),
    ]
    if ".gitignore" in there:
        calls.append(Call("POST", f"{base}/commit/{branch}", "remove .gitignore"))
    different = differences(prepared.files, {p: f for p, f in there.items() if p != ".gitignore"})
    changed = _changed(prepared, different)
    if changed:
        if "README.md" in changed:
            calls.append(Call("POST", "/api/validate-yaml", "is the card's metadata sound"))
        batches = -(-len(changed) // _PREUPLOAD_BATCH)
        calls += [Call("POST", f"{base}/preupload/{branch}", "which files go as LFS")] * batches
        size = sum(changed.values())
        if view.xet:
            calls += [
                Call("GET", f"{base}/xet-write-token/{branch}", "a token for storage"),
                Call("PUT", "(Xet storage)", "contents that it has not", size),
            ]
        else:
            calls += [
                Call("POST", f"/{repo}.git/info/lfs/objects/batch", "which contents it has not"),
                Call("PUT", "(LFS storage)", "contents that it has not", size),
            ]
    if different:
        stray = sum(path not in prepared.files and path not in HUB_OWN_FILES for path in there)
        calls.append(Call("POST", f"{base}/commit/{branch}", f"{len(changed)} files, {stray} taken away"))
    return [
        *calls,
        Call("GET", f"{base}/tree/{branch}", "compare with the manifest"),
        Call("GET", f"{base}/revision/main", "is main as it was"),
        Call("GET", request, "is it a draft"),
        Call("POST", f"{request}/status", "open it"),
        Call("POST", f"{request}/merge", "merge: main changes here"),
        Call("GET", f"{base}/tree/main", "compare with the manifest"),
        Call("GET", f"{base}/revision/main", "commit to tag"),
    ]
