"""A bundle in a container registry: `oci://HOST/NAME[:TAG]`, as a ModelPack artifact.

One blob a file, named by its SHA-256 as the bundle's manifest has it, in an OCI 1.1 image manifest with the
media types and annotations of CNCF ModelPack (github.com/modelpack/model-spec, specs-go/v1), which `oras`,
`modctl`, Harbor and Kubernetes image volumes read; each layer also carries the title that `oras pull`
restores its path from. Nothing in it depends on time or place: a bundle has one digest in every registry.

Blobs go first, those the registry has are left out; the manifest is put last, under the tag, in one request.
So a tag names a whole bundle or does not exist, and the same command run again goes on from there.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packager.artifact import writing
from packager.bundle.contents import path_problem
from packager.bundle.signature import SIGNATURE_NAME
from packager.bundle.verify import VerifiedBundle
from packager.checkpoint.hub_faults import PassingFault, Patience
from packager.errors import BadInput, IntegrityFailure, RemoteFailure, UsageProblem
from packager.publish.hub_transaction import LocalFile, local_files, short_digest
from packager.publish.preflight import preflight

if TYPE_CHECKING:
    import requests
    from oras.provider import Registry

MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
ARTIFACT_TYPE = "application/vnd.cncf.model.manifest.v1+json"
BUNDLE_DIGEST = "io.github.moe-packager.bundle.digest"
"""Annotation with the digest of the bundle's manifest: its identity wherever it lies."""
_CONFIG_TYPE = "application/vnd.cncf.model.config.v1+json"
_WEIGHT = "application/vnd.cncf.model.weight.v1.raw"
_WEIGHT_CONFIG = "application/vnd.cncf.model.weight.config.v1.raw"
_DOC = "application/vnd.cncf.model.doc.v1.raw"
_FILEPATH = "org.cncf.model.filepath"
_TITLE = "org.opencontainers.image.title"
_CHUNK = 32 << 20
_LARGEST_MANIFEST = 4 << 20
"""The distribution specification lets a registry refuse a larger one."""
_TIMEOUT_S = (20.0, 300.0)
"""To connect; between two pieces of an answer."""
_AGAIN = "Run the same command again: what the registry has is not sent again, and the tag is put last."
_LOOPBACK = re.compile(r"(localhost|127(\.\d+){3}|\[::1\])(:\d+)?")
_REFERENCE = re.compile(
    # host[:port]/path[:tag][@digest], as github.com/distribution/reference has it
    r"(?P<host>[A-Za-z0-9.-]+(?::\d+)?|\[[0-9A-Fa-f:]+\](?::\d+)?)"
    r"/(?P<name>[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*)"
    r"(?::(?P<tag>\w[\w.-]{0,127}))?(?:@(?P<digest>sha256:[0-9a-f]{64}))?",
    re.ASCII,
)


@dataclass(frozen=True)
class Reference:
    """Where an artifact lies."""

    host: str
    name: str
    tag: str | None = None
    digest: str | None = None

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        return f"{self.host}/{self.name}{tag}" + (f"@{self.digest}" if self.digest else "")


@dataclass(frozen=True)
class Pushed:
    """A bundle in a registry."""

    reference: str
    """`HOST/NAME@sha256:…`: what never moves."""
    tag: str
    digest: str
    """Of the bundle's manifest: its identity wherever it lies."""
    files: int
    bytes: int
    uploaded_bytes: int
    already_there: bool


def parse_reference(text: str) -> Reference:
    """Read `HOST/NAME[:TAG][@sha256:…]`. Raises UsageProblem: it is none."""
    found = _REFERENCE.fullmatch(text)
    if found is None or not re.search(r"[.:]|^localhost$", found["host"]):
        raise UsageProblem(
            f"{text!r} does not name a place in a registry",
            "Write oci://host/name or oci://host/name:tag, lower case, with the registry's host.",
        )
    return Reference(**found.groupdict())


def push(
    bundle: Path,
    target: str,
    *,
    tag: str | None = None,
    public_key: Path | None = None,
    attempts: int = 4,
    wait_s: float = 2.0,
    progress: Callable[[str], None],
) -> Pushed:
    """Push a verified bundle. Credentials are those of `docker login` or `oras login`.

    Args:
        target: `HOST/NAME[:TAG]`; plain HTTP is spoken to loopback addresses alone.
        tag: None: the target's, else `bundle-<first 12 digits of the digest>`.
        attempts: how often a passing fault (5xx, 429, lost connection) is met with another try.
        wait_s: seconds before the second try; doubled before each later one.

    Raises:
        BadInput, IntegrityFailure, GateFailed, UsageProblem: as `preflight`; a tag that names other content.
        RemoteFailure: the registry refuses, cannot be reached, or holds other bytes than were sent.
    """
    reference = parse_reference(target)
    if reference.digest is not None:
        raise UsageProblem(f"{target} names a digest", "Name a tag, or nothing, to push to.")
    if tag and reference.tag and tag != reference.tag:
        raise UsageProblem(f"--tag {tag} and {target} name different tags", "Leave one out.")
    verified = preflight(bundle, public_key, progress)
    chosen = tag or reference.tag or f"bundle-{short_digest(verified.digest)}"
    if not re.fullmatch(r"\w[\w.-]{0,127}", chosen, re.ASCII):
        raise UsageProblem(f"{chosen!r} cannot be a tag", "Use letters, digits, `_`, `.` and `-`.")
    attempt = _Push(Reference(reference.host, reference.name, chosen), bundle, verified, progress)
    patience = Patience(attempts, wait_s, progress)
    while True:
        try:
            with _faults(reference.host):
                return attempt.run()
        except PassingFault as fault:
            patience.wait(fault)


def pull(
    target: str,
    cache: Path,
    *,
    attempts: int = 4,
    wait_s: float = 2.0,
    progress: Callable[[str], None],
) -> Path:
    """Fetch an artifact into `cache`, as far as it is not there, and return its folder.

    Every blob is checked against its digest while it is written; a file that was whole is not fetched again.

    Raises:
        UsageProblem: no such name. RemoteFailure: no such artifact, or no registry.
        IntegrityFailure: a blob is not what its digest says, or the manifest names a path that may not be.
    """
    reference = parse_reference(target)
    patience = Patience(attempts, wait_s, progress)
    while True:
        try:
            with _faults(reference.host, "Check host and network, then run the same command again."):
                return _pull(_Client(reference.host, reference.name), reference, cache, progress)
        except PassingFault as fault:
            patience.wait(fault)


class _Client:
    """One repository of one registry, over the ORAS client's session and authentication."""

    def __init__(self, host: str, name: str) -> None:
        self.host, self.name = host, name
        self._registry = _registry(host)

    def call(self, method: str, path: str, **options: Any) -> requests.Response:
        """A request to the repository; `path` after `/v2/NAME/`, or a whole URL."""
        url = path
        if not path.startswith(("http://", "https://")):
            url = f"{self._registry.prefix}://{self.host}/v2/{self.name}/{path}"
        # Not through its retries: they repeat every error for two minutes, and ours tell the user.
        plain = type(self._registry).do_request.__wrapped__
        reply: requests.Response = plain(self._registry, url, method, **options)
        if reply.status_code in (408, 425, 429) or reply.status_code >= 500:
            raise PassingFault(_said(reply, self.host), _AGAIN, asked_wait_s=_asked(reply))
        if reply.status_code in (401, 403):
            raise RemoteFailure(_said(reply, self.host), f"Run `docker login {self.host}` first.")
        return reply

    def has(self, digest: str) -> bool:
        """Whether the blob is there."""
        return self.call("HEAD", f"blobs/{digest}").status_code == 200

    def put_blob(self, digest: str, chunks: Iterator[bytes]) -> None:
        """Upload in chunks, so that neither a file nor a whole shard is held in memory."""
        reply = self._expect(self.call("POST", "blobs/uploads/"), (202,))
        start = 0
        for chunk in chunks:
            reply = self._expect(
                self.call(
                    "PATCH",
                    self._location(reply),
                    data=chunk,
                    headers={
                        "Content-Type": "application/octet-stream",
                        "Content-Range": f"{start}-{start + len(chunk) - 1}",
                    },
                ),
                (202,),
            )
            start += len(chunk)
        location = self._location(reply)
        closing = f"{location}{'&' if '?' in location else '?'}digest={digest}"
        self._expect(self.call("PUT", closing, data=b""), (201, 204))

    def manifest(self, reference: str) -> tuple[bytes, str] | None:
        """The manifest's bytes and digest; None: there is none."""
        reply = self.call("GET", f"manifests/{reference}", headers={"Accept": MANIFEST_TYPE})
        if reply.status_code == 404:
            return None
        raw = self._expect(reply, (200,)).content
        return raw, f"sha256:{hashlib.sha256(raw).hexdigest()}"

    def put_manifest(self, tag: str, raw: bytes) -> None:
        """Put the manifest under a tag."""
        headers = {"Content-Type": MANIFEST_TYPE}
        self._expect(self.call("PUT", f"manifests/{tag}", data=raw, headers=headers), (201,))

    def blob(self, digest: str) -> Iterator[bytes]:
        """The blob's bytes, in pieces."""
        with self._expect(self.call("GET", f"blobs/{digest}", stream=True), (200,)) as reply:
            yield from reply.iter_content(1 << 20)

    def _location(self, reply: requests.Response) -> str:
        location = reply.headers.get("Location", "")
        if not location:
            raise RemoteFailure(f"{self.host} began an upload without saying where it goes", _AGAIN)
        return location if "://" in location else f"{self._registry.prefix}://{self.host}{location}"

    def _expect(self, reply: requests.Response, statuses: tuple[int, ...]) -> requests.Response:
        if reply.status_code not in statuses:
            # An upload that was cut off is gone (404), or has another offset (416): a new one is begun.
            kind = PassingFault if reply.request.method in ("PATCH", "PUT") else RemoteFailure
            raise kind(_said(reply, self.host), _AGAIN)
        return reply


class _Push:
    """One bundle on its way to one tag; `run` may be called again after any fault."""

    def __init__(
        self, where: Reference, bundle: Path, verified: VerifiedBundle, progress: Callable[[str], None]
    ) -> None:
        self.where, self.verified, self.progress = where, verified, progress
        self.files = local_files(bundle)
        self.config = _canonical(_config(verified, self.files))
        self.raw = _canonical(_manifest(verified, self.files, self.config))
        if len(self.raw) > _LARGEST_MANIFEST:
            raise BadInput(f"{bundle} has too many files for one OCI manifest ({len(self.files)})")
        self.digest = f"sha256:{hashlib.sha256(self.raw).hexdigest()}"
        self.client = _Client(where.host, where.name)
        self.uploaded = 0

    def run(self) -> Pushed:
        assert self.where.tag is not None
        found = self.client.manifest(self.where.tag)
        if found is not None and found[1] != self.digest:
            raise UsageProblem(
                f"the tag {self.where} names another content ({found[1]})",
                "Choose another tag with --tag; a published tag is never moved.",
            )
        if found is None:
            self._upload()
            self.client.put_manifest(self.where.tag, self.raw)
            self._compare()
        return Pushed(
            reference=str(Reference(self.where.host, self.where.name, digest=self.digest)),
            tag=self.where.tag,
            digest=self.verified.digest,
            files=len(self.files),
            bytes=sum(file.size for file in self.files.values()),
            uploaded_bytes=self.uploaded,
            already_there=found is not None and self.uploaded == 0,
        )

    def _upload(self) -> None:
        blobs = {file.sha256: file for file in self.files.values()}
        self.progress(f"{self.where}: {len(blobs)} blobs")
        for sha256, file in blobs.items():
            if not self.client.has(f"sha256:{sha256}"):
                self.client.put_blob(f"sha256:{sha256}", _chunks(file.path))
                self.uploaded += file.size
        digest = f"sha256:{hashlib.sha256(self.config).hexdigest()}"
        if not self.client.has(digest):
            self.client.put_blob(digest, iter([self.config]))
            self.uploaded += len(self.config)

    def _compare(self) -> None:
        assert self.where.tag is not None
        found = self.client.manifest(self.where.tag)
        if found is None or found[0] != self.raw:
            raise RemoteFailure(
                f"{self.where} is not the manifest that was put there",
                "Somebody else pushed to the same tag; choose another with --tag.",
            )


def _pull(client: _Client, reference: Reference, cache: Path, progress: Callable[[str], None]) -> Path:
    named = reference.digest or reference.tag or "latest"
    found = client.manifest(named)
    if found is None:
        raise RemoteFailure(f"{reference.host} has no {reference.name} at {named}", "Check name and tag.")
    raw, digest = found
    if reference.digest is not None and digest != reference.digest:
        raise IntegrityFailure(f"{reference}: the registry sent another manifest ({digest})", _AGAIN)
    layers = _layers(raw, str(reference))
    target = cache / reference.host.replace(":", "_") / reference.name / digest.replace(":", "-")
    if target.is_dir():
        return target
    part = target.with_name(target.name + ".part")
    progress(f"pulling {len(layers)} files of {client.host}/{client.name}@{digest[:19]}…")
    with writing(target):
        for path, (blob, size) in layers.items():
            file = part / path
            if file.is_file() and file.stat().st_size == size:
                continue  # it is renamed into place only when its digest was right
            file.parent.mkdir(parents=True, exist_ok=True)
            _fetch(client, blob, size, file)
        part.rename(target)
    return target


def _fetch(client: _Client, blob: str, size: int, file: Path) -> None:
    unfinished = file.with_name(file.name + ".incomplete")
    seen, got = hashlib.sha256(), 0
    with unfinished.open("wb") as out:
        for piece in client.blob(blob):
            got += len(piece)
            if got > size:
                break
            seen.update(piece)
            out.write(piece)
    if got != size or f"sha256:{seen.hexdigest()}" != blob:
        unfinished.unlink()
        raise PassingFault(f"{client.host} sent other bytes for {file.name} than {blob} names", _AGAIN)
    unfinished.rename(file)


def _layers(raw: bytes, reference: str) -> dict[str, tuple[str, int]]:
    """Digest and size of each file of a manifest by its path; nothing that could lie outside the folder."""
    try:
        document = json.loads(raw)
        found: dict[str, tuple[str, int]] = {}
        for layer in document["layers"]:
            notes = layer.get("annotations") or {}
            path = notes.get(_FILEPATH) or notes[_TITLE]
            digest, size = layer["digest"], layer["size"]
            if not re.fullmatch(r"sha256:[0-9a-f]{64}", digest) or not isinstance(size, int) or size < 0:
                raise ValueError(f"{path}: {digest}, {size}")
            if _escapes(path) or path in found:
                raise IntegrityFailure(
                    f"{reference} holds a path that no bundle has: {path!r}",
                    "Do not use it; ask its publisher.",
                )
            found[path] = (digest, size)
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        raise BadInput(f"{reference} is no bundle: its manifest cannot be read ({err})") from None
    return found


def _escapes(path: str) -> bool:
    parts = path.split("/")
    if path == SIGNATURE_NAME:
        return False
    return "\\" in path or any(p in ("", ".", "..") for p in parts) or path_problem(path) is not None


def _config(verified: VerifiedBundle, files: dict[str, LocalFile]) -> dict[str, Any]:
    """ModelPack's config document (schema/config-schema.json), from the lock alone."""
    lock = verified.lock
    descriptor: dict[str, Any] = {"name": lock.recipe, "version": verified.digest}
    if lock.license:
        descriptor["licenses"] = [lock.license]
    if lock.source.revision:
        descriptor["revision"] = lock.source.revision
    return {
        "descriptor": descriptor,
        "config": {
            "architecture": "transformer",
            "format": "safetensors",
            "capabilities": {"inputTypes": ["text"], "outputTypes": ["text"]},
        },
        "modelfs": {"type": "layers", "diffIds": [f"sha256:{file.sha256}" for file in files.values()]},
    }


def _manifest(verified: VerifiedBundle, files: dict[str, LocalFile], config: bytes) -> dict[str, Any]:
    return {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "artifactType": ARTIFACT_TYPE,
        "config": {
            "mediaType": _CONFIG_TYPE,
            "digest": f"sha256:{hashlib.sha256(config).hexdigest()}",
            "size": len(config),
        },
        "layers": [
            {
                "mediaType": _media_type(path),
                "digest": f"sha256:{file.sha256}",
                "size": file.size,
                "annotations": {_FILEPATH: path, _TITLE: path},
            }
            for path, file in files.items()
        ],
        "annotations": {
            _TITLE: verified.lock.recipe,
            "org.opencontainers.image.licenses": verified.lock.license or "",
            BUNDLE_DIGEST: verified.digest,
        },
    }


def _media_type(path: str) -> str:
    if path.endswith(".safetensors"):
        return _WEIGHT
    if path.startswith("evidence/") or path.endswith((".md", ".txt")):
        return _DOC
    return _WEIGHT_CONFIG if path.endswith((".json", ".jinja", ".yaml", ".model")) else _DOC


def _canonical(document: dict[str, Any]) -> bytes:
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk


def _registry(host: str) -> Registry:
    try:
        from oras.provider import Registry
    except ImportError:
        raise UsageProblem(
            "oci:// needs the ORAS client, which is not installed", "pip install 'moe-packager[hubs]'"
        ) from None
    import oras.container
    from requests.adapters import HTTPAdapter

    class Patient(HTTPAdapter):
        def send(self, *args: Any, **kwargs: Any) -> Any:
            return super().send(*args, **(kwargs | {"timeout": _TIMEOUT_S}))

    registry = Registry(hostname=host, insecure=_LOOPBACK.fullmatch(host) is not None)
    registry.session.mount("http://", Patient())
    registry.session.mount("https://", Patient())
    registry.auth.load_configs(oras.container.Container(f"{host}/any"))
    return registry


@contextmanager
def _faults(host: str, again: str = _AGAIN) -> Iterator[None]:
    """Turn what requests and ORAS raise into PassingFault or RemoteFailure."""
    import requests
    from urllib3.exceptions import MaxRetryError, NewConnectionError

    try:
        yield
    except requests.exceptions.SSLError as err:
        raise RemoteFailure(
            f"{host} cannot be trusted: {err}", "Check the name and the certificate."
        ) from None
    except requests.exceptions.RequestException as err:
        cause = err.args[0] if err.args else None
        if isinstance(cause, MaxRetryError) and isinstance(cause.reason, NewConnectionError):
            raise PassingFault(f"no registry answers at {host}", again) from None
        raise PassingFault(f"the connection to {host} broke: {_short(err)}", again) from None
    except ValueError as err:
        # ORAS raises these where it cannot log in.
        if "authentication" not in str(err).lower():
            raise
        raise RemoteFailure(f"{host} asks for a login: {err}", f"Run `docker login {host}` first.") from None


def _said(reply: requests.Response, host: str) -> str:
    try:
        reason = "; ".join(str(e.get("message") or e["code"]) for e in reply.json()["errors"])
    except (ValueError, KeyError, TypeError, AttributeError):
        reason = reply.reason or ""
    return f"{host} answered {reply.status_code} to {reply.request.method}: {reason}"


def _asked(reply: requests.Response) -> float:
    stated = reply.headers.get("Retry-After", "")
    return float(stated) if stated.isascii() and stated.isdigit() else 0.0


def _short(err: Exception) -> str:
    return " ".join(str(err).split())[:200] or type(err).__name__
