"""The wheel in a bundle: what engines lack of BailingMoeV2, and nothing else of this package.

It holds the modules of packager.bailing that `vllm_plugin` needs, byte for byte: who reviews those has
reviewed the wheel. Installed, vLLM finds the config class and the model with the EAGLE3 interface through the
entry point group `vllm.general_plugins`, and SGLang, whose own model suffices, finds the config class through
`sglang.srt.plugins` (docs.sglang.io/docs/hardware-platforms/plugin). Where there is no pip
(a container without network or root), unpacking it into a folder of PYTHONPATH installs it too: plain Python.

It is the one file of a bundle that is code. So `wheel_problem` takes only files whose digest stands in
`REVIEWED`, which grows by one line a release of the plugin; no signature can put another in its place.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
import zipfile
from collections.abc import Mapping
from importlib.resources import files
from pathlib import PurePosixPath

PLUGIN_VERSION = "0.1.0"
"""Of the wheel's contents; not of this package, so that most releases of it leave the wheel as it was."""
PACKAGE = "bailing_moe_v2_plugin"
WHEEL_FOLDER = "deploy"
"""Beside the files that build a container from it."""
WHEEL_NAME = f"{PACKAGE}-{PLUGIN_VERSION}-py3-none-any.whl"
WHEEL_PATH = f"{WHEEL_FOLDER}/{WHEEL_NAME}"
"""In a bundle."""
MODULES = ("hf_config", "vllm_model", "vllm_plugin")
"""Of packager.bailing; each imports only engines, or one of the others by a relative name."""
REVIEWED: Mapping[str, str] = {
    "bailing_moe_v2_plugin-0.1.0-py3-none-any.whl": (
        "548199ed175340fcfde343fbeba1da1a6c2f581e00e792d17dbf412f6beef42a"
    ),
}
"""File name to SHA-256 of every wheel that a release of this package has put into bundles."""
_WHEEL = re.compile(rf"{WHEEL_FOLDER}/{PACKAGE}-[0-9.]+-py3-none-any\.whl")
_EPOCH = (1980, 1, 1, 0, 0, 0)
"""The earliest date that a zip file can state."""
_ENTRY_POINTS = f"""\
[sglang.srt.plugins]
bailing_moe_v2_config = {PACKAGE}.hf_config:register

[vllm.general_plugins]
bailing_moe_v2_eagle3 = {PACKAGE}.vllm_plugin:register
"""
_METADATA = f"""\
Metadata-Version: 2.4
Name: {PACKAGE.replace("_", "-")}
Version: {PLUGIN_VERSION}
Summary: BailingMoeV2 for vLLM without remote code and with EAGLE3; its config for SGLang.
License-Expression: Apache-2.0
License-File: LICENSE
Requires-Python: >=3.10
Description-Content-Type: text/markdown

Registers the configuration of `bailing_moe` and `bailing_moe_v2` with transformers, and with vLLM a
`BailingMoeV2ForCausalLM` that feeds EAGLE3 drafts. It names no dependency: the engine that it is installed
beside brings transformers, and vLLM is distributed under more than one name.
"""
_WHEEL_FILE = f"""\
Wheel-Version: 1.0
Generator: moe-packager (plugin {PLUGIN_VERSION})
Root-Is-Purelib: true
Tag: py3-none-any
"""


def build_wheel() -> bytes:
    """The wheel's bytes: the same on every machine and with every Python, for the same sources.

    Members are stored, not compressed, since zlib's output differs from one build of it to another.
    """
    members = {f"{PACKAGE}/__init__.py": b""}
    for name in MODULES:
        members[f"{PACKAGE}/{name}.py"] = files("packager.bailing").joinpath(f"{name}.py").read_bytes()
    info = f"{PACKAGE}-{PLUGIN_VERSION}.dist-info"
    members |= {
        f"{info}/METADATA": _METADATA.encode(),
        f"{info}/WHEEL": _WHEEL_FILE.encode(),
        f"{info}/entry_points.txt": _ENTRY_POINTS.encode(),
        f"{info}/licenses/LICENSE": files("packager.bundle").joinpath("apache-2.0.txt").read_bytes(),
    }
    record = f"{info}/RECORD"
    members[record] = _record(members, record)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for path, data in members.items():
            member = zipfile.ZipInfo(path, _EPOCH)
            member.create_system = 3  # Unix, whatever this runs on
            member.external_attr = 0o100644 << 16
            archive.writestr(member, data)
    return buffer.getvalue()


def _record(members: dict[str, bytes], itself: str) -> bytes:
    """RECORD of a wheel (packaging.python.org, binary distribution format): path, digest, size."""
    lines = []
    for path, data in members.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        lines.append(f"{path},sha256={digest},{len(data)}\n")
    return "".join([*lines, f"{itself},,\n"]).encode()


def is_wheel_path(path: str) -> bool:
    """Whether a path in a bundle is one where the plugin's wheel, of any version, may lie."""
    return _WHEEL.fullmatch(path) is not None


def wheel_problem(path: str, data: bytes) -> str | None:
    """Why the content of a file where `is_wheel_path` is not a wheel that was reviewed, or None."""
    known = REVIEWED.get(PurePosixPath(path).name)
    if known is None:
        return "a wheel that this version of packager does not know; a newer one may"
    return (
        None
        if hashlib.sha256(data).hexdigest() == known
        else "not the plugin that was reviewed: its code is other"
    )
