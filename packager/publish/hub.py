"""Publishing to a hub as one transaction: main changes once, from what it was to the whole bundle.

    preflight  the bundle verifies, its gates passed, it is licensed and signed; the token may write, the tag
               is free, …: everything that stands in the way is told at once
    settings   the repository is made, private and gated if asked, before it holds anything
    request    a draft pull request named after the bundle's digest (or the one left by an earlier attempt)
    upload     one commit to refs/pr/N; contents the hub has already are not sent again
    compare    the remote tree against the manifest: every path, size and digest
    merge      the only step that touches main
    tag        names the commit; then collections, and the word about the tag whose place it takes

Each step looks first at what the hub has, so the same command run again, after any fault, goes on from there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from packager.checkpoint.hub_faults import PassingFault, Patience, hub_faults
from packager.errors import RemoteFailure, UsageProblem
from packager.publish.findings import Finding, refuse, warnings_of
from packager.publish.hub_checks import HubSettings, HubView, look_at_hub, xet_usable
from packager.publish.hub_transaction import (
    LocalFile,
    Prepared,
    Published,
    Transaction,
    differences,
    local_files,
    short_digest,
)
from packager.publish.preflight import Limits, examine_bundle

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_CONNECT_S = 30.0
ANSWER_S = 300.0
"""Seconds without a byte after which a request counts as lost: the client itself would wait for ever."""


_Answer = TypeVar("_Answer")


class Patiently(Protocol):
    """Runs a step until it succeeds or patience with passing faults ends."""

    def __call__(self, step: Callable[[], _Answer]) -> _Answer:
        """Its answer."""


def publish(
    bundle: Path,
    repo_id: str,
    *,
    endpoint: str | None = None,
    token: str | None = None,
    tag: str | None = None,
    private: bool = False,
    gated: str | None = None,
    collections: tuple[str, ...] = (),
    deprecate: str | None = None,
    reason: str | None = None,
    public_key: Path | None = None,
    attempts: int = 4,
    wait_s: float = 2.0,
    answer_s: float = ANSWER_S,
    progress: Callable[[str], None],
) -> Published:
    """Publish a verified bundle to `repo_id` on a hub.

    Args:
        endpoint: hub address; None: the client's own (HF_ENDPOINT or huggingface.co).
        token: None: the token that `hf auth login` or HF_TOKEN provides, or one that the hub gives for the
            identity of a CI job (trusted publishing).
        tag: None: `bundle-<first 12 digits of the digest>`.
        private: make the repository private if it has to be made.
        gated: auto or manual: readers have to ask for access; None: as it is.
        collections: slugs of collections to add the repository to.
        deprecate: an older tag that this publication takes the place of; `reason`: why.
        attempts: how often a passing fault (5xx, 429, lost connection) is met with another try.
        wait_s: seconds before the second try; doubled before each later one.
        answer_s: seconds without a byte after which a request counts as lost.

    Raises:
        BadInput, IntegrityFailure, GateFailed, UsageProblem: what stands in the way, all of it at once; a tag
            that names other content.
        RemoteFailure: the hub refuses, cannot be reached, or holds other bytes than were sent.
    """
    with publication(
        bundle, repo_id, endpoint=endpoint, token=token, tag=tag, private=private, gated=gated,
        collections=collections, deprecate=deprecate, reason=reason, public_key=public_key, attempts=attempts,
        wait_s=wait_s, answer_s=answer_s, progress=progress,
    ) as run:  # fmt: skip
        return run.patiently(Transaction(run.api, run.prepared, progress).run)


@dataclass(frozen=True)
class Request:
    """A request that was made."""

    method: str
    path: str


@dataclass(frozen=True)
class Publication:
    """A publication that may go ahead: the client, what the preflight found, and its patience."""

    api: HfApi
    prepared: Prepared
    patiently: Patiently
    requests: list[Request]
    """Made so far."""


@contextmanager
def publication(
    bundle: Path,
    repo_id: str,
    *,
    endpoint: str | None = None,
    token: str | None = None,
    tag: str | None = None,
    public_key: Path | None = None,
    attempts: int = 4,
    wait_s: float = 2.0,
    answer_s: float = ANSWER_S,
    ask: bool = True,
    progress: Callable[[str], None],
    **settings: object,
) -> Iterator[Publication]:
    """The preflight; inside `with` the client has time limits, and in CI perhaps a token for its identity.

    Args:
        ask: False: the hub is asked nothing.

    Raises:
        As `publish`.
    """
    from huggingface_hub import HfApi

    local, findings = examine_bundle(bundle, public_key, progress, limits=Limits())
    tag = tag or f"bundle-{short_digest(local.digest)}"
    wanted = HubSettings(check_repo_id(repo_id), tag, **settings)  # type: ignore[arg-type]
    files = local_files(bundle)
    api = HfApi(endpoint=endpoint, token=token)

    def patiently(step: Callable[[], _Answer]) -> _Answer:
        patience = Patience(attempts, wait_s, progress)
        while True:
            try:
                with hub_faults(repo_id, api.endpoint, writing=True):
                    return step()
            except PassingFault as fault:
                patience.wait(fault)

    total = sum(file.size for file in files.values())
    requests: list[Request] = []
    with _impatient_client(answer_s, requests), _identity(api, repo_id, progress):
        view = HubView(xet=xet_usable())
        if ask:
            progress(f"asking {api.endpoint} about {repo_id}")
            try:
                view = patiently(lambda: look_at_hub(api, wanted, total))
            except (RemoteFailure, UsageProblem) as err:
                findings.append(Finding(err.message, err.remedy, type(err)))
        findings += view.findings
        if taken := _taken_tag(view, wanted, files):
            findings.append(taken)
        refuse(findings, f"{bundle} to {repo_id}")
        warnings = warnings_of(findings)
        for line in [*warnings, *(f"the hub does not tell {what}" for what in view.not_told)]:
            progress(f"note: {line}")
        yield Publication(api, Prepared(local, files, wanted, view, warnings), patiently, requests)


def check_repo_id(text: str) -> str:
    """`text` if it can name a repository with its owner. Raises UsageProblem otherwise."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", text, re.ASCII):
        raise UsageProblem(f"{text!r} does not name a repository", "Write hf://organisation/name.")
    if "--" in text or ".." in text or text.endswith((".git", ".ipynb", ".", "-")):
        raise UsageProblem(
            f"a hub takes no repository of the name {text!r}",
            "Leave out '--' and '..', and '.', '-', '.git' and '.ipynb' at the end.",
        )
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


def _taken_tag(view: HubView, wanted: HubSettings, files: dict[str, LocalFile]) -> Finding | None:
    if view.tagged is None or (view.tagged == view.head and not differences(files, view.tree)):
        return None
    return Finding(
        f"the tag {wanted.tag} of {wanted.repo_id} names another content (commit {view.tagged})",
        "Choose another tag with --tag; a published tag is never moved.",
        UsageProblem,
    )


@contextmanager
def _impatient_client(answer_s: float, requests: list[Request]) -> Iterator[None]:
    """The hub client with time limits: its own waits for ever on a connection that has gone silent.

    Every request is noted in `requests`.
    """
    import httpx
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http

    before = _http._GLOBAL_CLIENT_FACTORY

    limits = httpx.Timeout(answer_s, connect=min(_CONNECT_S, answer_s), pool=None).as_dict()

    def note(request: httpx.Request) -> None:
        requests.append(Request(request.method, request.url.raw_path.decode()))
        # Here and not on the client: many of the client's calls ask for no limit explicitly.
        asked = request.extensions.get("timeout") or {}
        request.extensions["timeout"] = limits | {k: v for k, v in asked.items() if v is not None}

    def limited() -> httpx.Client:
        client = before()
        client.event_hooks = {"request": [*client.event_hooks["request"], note]}
        return client

    set_client_factory(limited)
    try:
        yield
    finally:
        set_client_factory(before)


@contextmanager
def _identity(api: HfApi, repo_id: str, progress: Callable[[str], None]) -> Iterator[None]:
    """In a CI job without a token, let the client ask for one with the job's identity (trusted publishing).

    The client does that itself, and again when the token expires, if HF_OIDC_RESOURCE names the repository.
    """
    from huggingface_hub import get_token

    able = os.environ.get("HF_OIDC_ID_TOKEN") or os.environ.get("ACTIONS_ID_TOKEN_REQUEST_URL")
    if api.token or "HF_OIDC_RESOURCE" in os.environ or not able or get_token() is not None:
        yield
        return
    progress(f"no token, but a CI identity: asking {api.endpoint} for one that may write to {repo_id}")
    os.environ["HF_OIDC_RESOURCE"] = repo_id
    try:
        yield
    finally:
        os.environ.pop("HF_OIDC_RESOURCE", None)
