"""A publication to a loopback hub through the real client; then the bundle back from it, verified."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from packager.artifact import read_manifest
from packager.bundle.verify import verify_bundle
from packager.errors import BadInput
from packager.publish.hub import publish
from packager.publish.hub_accounts import Account
from packager.publish.hub_store import MAIN, HubError
from packager.publish.loopback_hub import LoopbackHub

_TOKEN = "rehearsal"


@dataclass(frozen=True)
class RehearsalResult:
    """What a rehearsal did and thereby proved. It names no address: the hub is gone."""

    repo_id: str
    digest: str
    """Of the bundle: the same wherever it is published."""
    revision: str
    """Commit oid of main on the loopback hub."""
    tag: str
    files: int
    bytes: int
    download: Path | None
    """The bundle as it came back, verified; None: it was taken away again."""
    requests: int
    """Requests that the hub answered."""
    methods: dict[str, int]
    """The same by method."""
    main_changes: int
    """How often main changed: once, or not at all if the hub was kept and had the bundle."""

    def lines(self) -> list[str]:
        """For people, 80 columns."""
        methods = ", ".join(f"{count} {method}" for method, count in sorted(self.methods.items()))
        kept = f"kept in {self.download}" if self.download else "nothing is left of it"
        return [
            f"rehearsed {self.repo_id}",
            f"bundle   {self.digest}",
            f"commit   {self.revision}, tag {self.tag}",
            f"sent     {self.files} files, {self.bytes / 1e9:.3f} GB, by the hub's own client",
            f"asked    {self.requests} requests ({methods})",
            f"main     changed {self.main_changes} time{'' if self.main_changes == 1 else 's'}",
            f"back     downloaded by its tag and verified; {kept}",
        ]


def rehearse(
    bundle: Path,
    repo_id: str,
    storage: Path | None,
    download_to: Path | None,
    progress: Callable[[str], None],
    *,
    tag: str | None = None,
    private: bool = False,
    gated: str | None = None,
    public_key: Path | None = None,
) -> RehearsalResult:
    """Publish to a hub on 127.0.0.1, download again, verify.

    Args:
        storage: directory of the hub; a later rehearsal goes on with what is there, but takes over its tag.
            None: a directory beside the bundle that is removed at the end.
        download_to: an empty or new directory, or that of an earlier download, which is replaced. None: as
            for `storage`.

    Raises:
        As `publish` and `verify_bundle`; BadInput: `download_to` holds something else; no room.
    """
    if download_to is not None:
        _clear(download_to)
    with _scratch(bundle, kept=(storage is not None) + (download_to is not None)) as scratch:
        target = download_to or scratch / "download"
        owner = repo_id.split("/")[0]
        accounts = {_TOKEN: Account("rehearsal", orgs={owner: "write"})}
        with _client_for_loopback(), LoopbackHub(storage or scratch / "hub", accounts=accounts) as hub:
            progress("a hub on this machine answers; nothing leaves it")
            _free_tag(hub, repo_id, tag)
            before = _main(hub, repo_id)
            published = publish(
                bundle,
                repo_id,
                endpoint=hub.url,
                token=_TOKEN,
                tag=tag,
                private=private,
                gated=gated,
                public_key=public_key,
                progress=lambda line: progress(line.replace(hub.url, "the hub on this machine")),
            )
            progress(f"downloading {repo_id}@{published.tag}")
            _download(hub.url, repo_id, published.tag, target)
            methods = Counter(method for method, _ in hub.requests)
            changes = _changes(hub, repo_id, before)
        verified = verify_bundle(target, public_key, progress=progress)
    return RehearsalResult(
        repo_id,
        verified.digest,
        published.revision,
        published.tag,
        verified.files,
        verified.bytes,
        download_to,
        methods.total(),
        dict(methods),
        changes,
    )


@contextlib.contextmanager
def _scratch(bundle: Path, *, kept: int) -> Iterator[Path]:
    """A directory beside the bundle for what nobody wants to keep; removed whatever happens.

    Args:
        kept: how many of hub and download lie elsewhere.
    """
    if kept == 2:
        yield bundle
        return
    needed = (2 - kept) * sum(entry.size for entry in read_manifest(bundle).files)
    beside = bundle.resolve().parent
    if shutil.disk_usage(beside).free < needed:
        raise BadInput(
            f"a rehearsal needs {needed / 1e9:.1f} GB in {beside}, which has not so much free",
            "Free space, or name other places with --hub-dir and --download-dir.",
        )
    try:
        scratch = tempfile.TemporaryDirectory(prefix=".rehearsal-", dir=beside)
    except OSError as err:
        raise BadInput(
            f"a rehearsal cannot write to {beside}: {err.strerror}",
            "Name other places with --hub-dir and --download-dir.",
        ) from err
    with scratch:
        yield Path(scratch.name)


def _main(hub: LoopbackHub, repo_id: str) -> str | None:
    return hub.store.resolve(repo_id, MAIN) if hub.store.exists(repo_id) else None


def _changes(hub: LoopbackHub, repo_id: str, before: str | None) -> int:
    """Commits of main since `before`; the first, which every new repository begins with, does not count."""
    count, at = 0, hub.store.commit(repo_id, MAIN)
    while at.parent is not None and at.oid != before:
        count, at = count + 1, hub.store.commit(repo_id, at.parent)
    return count


def _free_tag(hub: LoopbackHub, repo_id: str, tag: str | None) -> None:
    """A tag that was only rehearsed may name another bundle at the next rehearsal; a real one never moves."""
    with contextlib.suppress(HubError):
        hub.store.delete_ref(repo_id, f"refs/tags/{tag}")


def _download(endpoint: str, repo_id: str, revision: str, target: Path) -> None:
    from huggingface_hub import snapshot_download

    snapshot_download(repo_id, revision=revision, local_dir=target, endpoint=endpoint, token=_TOKEN)


def _clear(target: Path) -> None:
    """An earlier download is recognised by the client's own bookkeeping; nothing else is ever removed."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not (target / ".cache" / "huggingface").is_dir():
        raise BadInput(f"{target} holds something else than a download", "Choose an empty directory.")
    shutil.rmtree(target)


@contextlib.contextmanager
def _client_for_loopback() -> Iterator[None]:
    """The client without its progress bars, and online: HF_HUB_OFFLINE is meant for hubs elsewhere."""
    from huggingface_hub import constants
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    offline, silent = constants.HF_HUB_OFFLINE, are_progress_bars_disabled()
    constants.HF_HUB_OFFLINE = False
    disable_progress_bars()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline
        if not silent:
            enable_progress_bars()
