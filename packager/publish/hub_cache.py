"""What `org/name` means without a network: a snapshot that the hub client has put into its cache.

Layout (huggingface_hub, "Understand caching"): CACHE/models--org--name/refs/<branch or tag> holds a commit,
snapshots/<commit>/ the files as links into blobs/.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from packager.artifact import MANIFEST_NAME
from packager.bundle.faults import finish_command
from packager.checkpoint.hub_name import HubName, is_commit
from packager.errors import BadInput, UsageProblem


def cached_snapshot(text: str) -> Path:
    """The snapshot of `org/name` or `org/name@revision` in the hub cache; no request is made.

    Without a revision it is what the cache knows as `main`, or the only snapshot there is.

    Raises:
        UsageProblem: no name of a repository.
        BadInput: not in the cache, several snapshots to choose from, or one that was not downloaded whole;
            the remedy is the command that mends it.
    """
    from huggingface_hub import constants

    name = HubName.parse(f"hf://{text}")
    assert name is not None
    asked = name.revision if "@" in text else None
    repository = Path(constants.HF_HUB_CACHE) / ("models--" + name.repo.replace("/", "--"))
    commits = sorted(p.name for p in (repository / "snapshots").glob("*") if p.is_dir())
    commit = _commit(repository, name, asked, commits)
    if commit not in commits:
        raise BadInput(
            f"{text} is neither a directory nor in the hub cache ({constants.HF_HUB_CACHE})",
            f"Download it: {_download(name.repo, asked)}; or verify it from the hub: hf://{text}",
        )
    snapshot = repository / "snapshots" / commit
    if not (snapshot / MANIFEST_NAME).is_file():
        files = [p for p in snapshot.rglob("*") if not p.is_dir()]
        raise BadInput(
            f"{text} is in the hub cache (commit {commit}, {len(files)} files) without {MANIFEST_NAME}: "
            "the download was not finished, or it is no bundle",
            f"Finish the download: {finish_command(snapshot)}",
        )
    return snapshot


def _commit(repository: Path, name: HubName, asked: str | None, commits: list[str]) -> str | None:
    if asked is not None and (is_commit(asked) or asked in commits):
        return asked
    reference = repository / "refs" / (asked or "main")
    if reference.is_file():
        return reference.read_text().strip()
    if asked is not None or not commits:
        return None
    if len(commits) > 1:
        raise UsageProblem(
            f"the hub cache has {len(commits)} snapshots of {name.repo} and does not know which is main",
            "Name one: " + " or ".join(f"{name.repo}@{commit}" for commit in commits),
        )
    return commits[0]


def _download(repo: str, revision: str | None) -> str:
    return shlex.join(["hf", "download", repo, *(["--revision", revision] if revision else [])])
