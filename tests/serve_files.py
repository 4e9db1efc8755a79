"""A bundle's serve.yaml for tests of it and of the server, and what a command says of its draft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from packager.serving import ServeSpec, vllm_command

SERVE_FILE: dict[str, Any] = {
    "schema_version": 1,
    "engine": "vllm",
    "engine_versions": ">=0.32,<0.33",
    "served_name": "nano",
    "model": ".",
    "draft": "draft",
    "num_speculative_tokens": 3,
    "max_model_len": 512,
    "default_profile": "2xh20",
    "profiles": {
        "2xh20": {"device": "cuda", "tensor_parallel": 2, "args": ["vllm", "serve"]},
        "cpu": {"device": "cpu", "tensor_parallel": 1, "args": []},
    },
}


CONTEXTS = {
    "native": {"max_model_len": 512, "rotary": "trained"},
    "extended": {"max_model_len": 2048, "rotary": "extended"},
}


def write_bundle(path: Path, **changes: Any) -> Path:
    path.mkdir(exist_ok=True)
    (path / "serve.yaml").write_text(yaml.safe_dump({**SERVE_FILE, **changes}))
    return path


def speculative(spec: ServeSpec) -> dict[str, Any]:
    """The engine's speculative config in the published command."""
    command = vllm_command(spec, target="cuda")
    found: dict[str, Any] = json.loads(command[command.index("--speculative-config") + 1])
    return found
