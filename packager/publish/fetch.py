"""What a bundle is published as beside the Hugging Face hub, brought here: `ms://` and `oci://` addresses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from packager.errors import UsageProblem


def fetch(address: str, cache: Path, *, progress: Callable[[str], None]) -> Path:
    """The folder that `address` names, downloaded as far as it is not there.

    Args:
        address: `ms://ORG/NAME@REVISION` or `oci://HOST/NAME[:TAG][@sha256:…]`.
        cache: folder for what is downloaded.

    Raises:
        UsageProblem: no such scheme or name. RemoteFailure: it is not there, or no hub.
        IntegrityFailure: what came is not what its digest names.
    """
    if address.startswith("oci://"):
        from packager.publish.oci import pull

        return pull(address.removeprefix("oci://"), cache / "oci", progress=progress)
    if address.startswith("ms://"):
        from packager.publish import modelscope
        from packager.publish.hub import check_repo_id

        name, _, revision = address.removeprefix("ms://").partition("@")
        target = cache / "ms" / check_repo_id(name) / (revision or "master")
        return modelscope.download(name, revision or None, target)
    raise UsageProblem(f"{address} is no address of a bundle", "Use ms://ORG/NAME or oci://HOST/NAME:TAG.")
