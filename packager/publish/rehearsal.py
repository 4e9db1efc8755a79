"""A publication to a loopback hub through the real client; then the bundle back from it, verified."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from packager.bundle.verify import verify_bundle
from packager.errors import BadInput
from packager.publish.hub import publish
from packager.publish.hub_store import HubError
from packager.publish.loopback_hub import LoopbackHub

_TOKEN = "rehearsal"


@dataclass(frozen=True)
class RehearsalResult:
    """What a rehearsal did."""

    repo_id: str
    digest: str
    """Of the bundle: the same wherever it is published."""
    revision: str
    """Commit oid of main on the loopback hub."""
    tag: str
    files: int
    bytes: int
    download: Path
    """The bundle as it came back, verified."""
    requests: int
    """Requests that the hub answered."""


def rehearse(
    bundle: Path,
    repo_id: str,
    storage: Path,
    download_to: Path,
    progress: Callable[[str], None],
    *,
    tag: str | None = None,
    private: bool = False,
    public_key: Path | None = None,
) -> RehearsalResult:
    """Publish to a hub on 127.0.0.1, download again, verify.

    Args:
        storage: directory of the hub; a later rehearsal goes on with what is there, but takes over its tag.
        download_to: an empty or new directory, or that of an earlier download, which is replaced.

    Raises:
        As `publish` and `verify_bundle`; BadInput: `download_to` holds something else.
    """
    _clear(download_to)
    with _client_for_loopback(), LoopbackHub(storage) as hub:
        progress(f"loopback hub at {hub.url}, state in {storage}")
        _free_tag(hub, repo_id, tag)
        published = publish(
            bundle,
            repo_id,
            endpoint=hub.url,
            token=_TOKEN,
            tag=tag,
            private=private,
            public_key=public_key,
            progress=progress,
        )
        progress(f"downloading {repo_id}@{published.tag}")
        _download(hub.url, repo_id, published.tag, download_to)
        requests = len(hub.requests)
    verified = verify_bundle(download_to, public_key, progress=progress)
    return RehearsalResult(
        repo_id, verified.digest, published.revision, published.tag, verified.files, verified.bytes,
        download_to, requests,
    )  # fmt: skip


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
