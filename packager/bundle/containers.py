"""How a bundle is served from a container: Containerfile, compose.yaml, kubernetes.yaml.

One profile, the first for GPUs, in each; the command is `vllm_command`'s, with the bundle mounted at /model.
All run without a network once the bundle is there, and none needs an image of one's own: the plugin is
unpacked from the wheel beside these files, in Kubernetes by an init container.

Sources: the Compose Specification (compose-spec.json), Kubernetes' apps/v1, docs.vllm.ai on Docker
(`--ipc=host` or a larger /dev/shm for tensor parallelism) and on Kubernetes (probes on /health).
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from packager.bundle.plugin_wheel import WHEEL_NAME, WHEEL_PATH
from packager.bundle.serve_profiles import PORT, Profile, served_name
from packager.recipe import Recipe
from packager.serving import vllm_command
from packager.serving.engine import OFFLINE

CONTAINER_FILES = ("deploy/Containerfile", "deploy/compose.yaml", "deploy/kubernetes.yaml")
"""Paths in a bundle."""
ENGINE_IMAGE = "vllm/vllm-openai:v0.32.0"
"""Where the recipe pins none: the release that `ENGINE_VERSIONS` begins with."""
_MODEL = Path("/model")
_PLUGIN = "/opt/bailing-moe-v2-plugin"
_UNPACK = ("python3", "-m", "zipfile", "-e")
"""Installs a wheel of plain Python without pip, network or root."""
_UNMEASURED = "The evidence was not taken in a container."
_SLOWEST_READ = 0.2e9
"""Bytes/s of a cold network disk; what the time allowed for starting is reckoned with."""
_COMPILE_SECONDS = 1200
_PROBE_SECONDS = 10
_HUB_TOKEN = {
    "name": "HF_TOKEN",
    "valueFrom": {"secretKeyRef": {"name": "huggingface", "key": "token", "optional": True}},
}
"""For private and gated repositories: `kubectl create secret generic huggingface --from-file=token=FILE`."""


@dataclass(frozen=True)
class _Container:
    """What the three files share."""

    title: str
    name: str
    """A DNS label."""
    image: str
    command: tuple[str, ...]
    gpus: int
    startup_seconds: int
    weight_bytes: int
    download: tuple[str, str | None] | None
    """Hub repository and tag; None: the bundle goes elsewhere."""

    @property
    def pinned(self) -> bool:
        return "@sha256:" in self.image


def container_files(recipe: Recipe, profile: Profile, *, weight_bytes: int) -> dict[str, str]:
    """Path in the bundle -> text, of each of `CONTAINER_FILES`.

    Args:
        profile: one for GPUs.
        weight_bytes: size of all weights, target and draft; from it follow disk and starting time.
    """
    spec = profile.spec
    inside = replace(spec, model=_MODEL / spec.model, draft=_MODEL / spec.draft if spec.draft else None)
    repository = recipe.publish.target.removeprefix("hf://")
    container = _Container(
        title=" ".join(recipe.bundle.title.split()),
        name=_dns_label(served_name(recipe)),
        image=recipe.bundle.image or ENGINE_IMAGE,
        command=tuple(vllm_command(inside, host="0.0.0.0", port=PORT, python="python3", target="cuda")),
        gpus=profile.tensor_parallel,
        startup_seconds=math.ceil(_COMPILE_SECONDS + weight_bytes / _SLOWEST_READ),
        weight_bytes=weight_bytes,
        download=(repository, recipe.publish.tag) if repository != recipe.publish.target else None,
    )
    texts = (_containerfile(container), _compose(container), _kubernetes(container))
    return dict(zip(CONTAINER_FILES, texts, strict=True))


def _dns_label(name: str) -> str:
    """RFC 1035: what services and projects may be called."""
    label = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return (label if label[:1].isalpha() else f"model-{label}")[:50].strip("-")


def _comment(text: str) -> str:
    return "".join(f"# {line}".rstrip() + "\n" for line in text.splitlines())


def _pin(container: _Container) -> str:
    if container.pinned:
        return "The image is pinned by its digest."
    return (
        "The image is named by a tag, which its owner can move. Pin it by the digest that\n"
        f"`docker buildx imagetools inspect {container.image}` prints: name@sha256:…"
    )


def _containerfile(container: _Container) -> str:
    environment = " ".join(f"{key}={value}" for key, value in (OFFLINE | {"PYTHONPATH": _PLUGIN}).items())
    head = _comment(
        f"{container.title}: vLLM with the plugin, without weights. Build and run from the bundle's folder:\n"
        f"  docker build -t {container.name} deploy\n"
        f'  docker run --gpus all --ipc=host -v "$PWD":{_MODEL}:ro -p 127.0.0.1:{PORT}:{PORT} '
        f"{container.name}\n"
        f"{_UNMEASURED}\n{_pin(container)}"
    )
    unpack = json.dumps([*_UNPACK, f"/tmp/{WHEEL_NAME}", _PLUGIN])
    return (
        f"{head}ARG IMAGE={container.image}\n"
        "FROM ${IMAGE}\n"
        f"COPY {WHEEL_NAME} /tmp/\n"
        f"RUN {unpack}\n"
        f"ENV {environment}\n"
        f"EXPOSE {PORT}\n"
        f"ENTRYPOINT {json.dumps(list(container.command))}\n"
    )


def _compose(container: _Container) -> str:
    probe = f"import urllib.request as r; r.urlopen('http://127.0.0.1:{PORT}/health', timeout=5)"
    service: dict[str, Any] = {
        "build": {
            "context": ".",
            "dockerfile": "Containerfile",
            "args": {"IMAGE": container.image},
        },
        "image": f"{container.name}:local",
        "init": True,
        "restart": "unless-stopped",
        "stop_grace_period": "60s",
        "security_opt": ["no-new-privileges:true"],
        "ipc": "host",
        "ports": [f"127.0.0.1:{PORT}:{PORT}"],
        "volumes": [{"type": "bind", "source": "..", "target": str(_MODEL), "read_only": True}],
        "deploy": {
            "resources": {
                "reservations": {
                    "devices": [{"driver": "nvidia", "count": container.gpus, "capabilities": ["gpu"]}]
                }
            }
        },
        "healthcheck": {
            "test": ["CMD", "python3", "-c", probe],
            "interval": f"{_PROBE_SECONDS}s",
            "timeout": "10s",
            "retries": 3,
            "start_period": f"{container.startup_seconds}s",
        },
    }
    head = _comment(
        f"{container.title}. From the bundle's folder:\n"
        "  docker compose -f deploy/compose.yaml up --build\n"
        f"It listens on this machine alone, port {PORT}.\n{_UNMEASURED}\n{_pin(container)}"
    )
    return head + _yaml({"name": container.name, "services": {"model": service}})


def _kubernetes(container: _Container) -> str:
    labels = {"app.kubernetes.io/name": container.name, "app.kubernetes.io/managed-by": "moe-packager"}
    selector = {"app.kubernetes.io/name": container.name}
    meta = {"name": container.name, "labels": labels}
    # 1.25: the client's cache lies beside the files while it downloads.
    gibibytes = math.ceil(container.weight_bytes * 1.25 / 2**30) + 1
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": meta,
        "spec": {
            "accessModes": ["ReadWriteOnce"],
            "resources": {"requests": {"storage": f"{gibibytes}Gi"}},
        },
    }
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": meta,
        "spec": {
            "replicas": 1,
            "strategy": {"type": "Recreate"},
            "progressDeadlineSeconds": 4 * container.startup_seconds,
            "selector": {"matchLabels": selector},
            "template": {"metadata": {"labels": labels}, "spec": _pod(container)},
        },
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": meta,
        "spec": {
            "type": "ClusterIP",
            "selector": selector,
            "ports": [{"name": "http", "port": PORT, "targetPort": "http"}],
        },
    }
    if container.download:
        filled = (
            f"The first start downloads {container.download[0]} into the volume; later ones compare it.\n"
            "If that is private or gated: kubectl create secret generic huggingface --from-file=token=FILE"
        )
    else:
        filled = "Fill the volume with the bundle first: this release names no hub to download it from."
    head = _comment(
        f"{container.title}.\n  kubectl apply -f deploy/kubernetes.yaml\n{filled}\n"
        "Reachable inside the cluster alone; put authentication before it to open it further.\n"
        f"{_UNMEASURED}\n{_pin(container)}"
    )
    return head + "---\n".join(_yaml(document) for document in (claim, deployment, service))


def _pod(container: _Container) -> dict[str, Any]:
    restricted = {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    temporary = {"name": "tmp", "mountPath": "/tmp"}
    plugin = {"name": "plugin", "mountPath": _PLUGIN}
    before: list[dict[str, Any]] = []
    # A user without an entry in /etc/passwd: caches go where it may write, and torch asks for its name.
    home = {"HOME": "/tmp", "USER": "vllm"}
    if container.download:
        repository, tag = container.download
        before.append(
            {
                "name": "download",
                "image": container.image,
                "command": [
                    "hf", "download", repository, *(("--revision", tag) if tag else ()),
                    "--local-dir", str(_MODEL),
                ],
                "env": [*_environment(home), _HUB_TOKEN],
                "volumeMounts": [{"name": "model", "mountPath": str(_MODEL)}, temporary],
                "securityContext": restricted,
            }
        )  # fmt: skip
    before.append(
        {
            "name": "plugin",
            "image": container.image,
            "command": [*_UNPACK, f"{_MODEL}/{WHEEL_PATH}", _PLUGIN],
            "volumeMounts": [{"name": "model", "mountPath": str(_MODEL), "readOnly": True}, plugin],
            "securityContext": restricted,
        }
    )
    health = {"httpGet": {"path": "/health", "port": "http"}, "timeoutSeconds": 5}
    gpus = {"nvidia.com/gpu": container.gpus}
    engine = {
        "name": "engine",
        "image": container.image,
        "command": list(container.command),
        "env": _environment(OFFLINE | home | {"PYTHONPATH": _PLUGIN}),
        "ports": [{"name": "http", "containerPort": PORT}],
        "startupProbe": {
            **health,
            "periodSeconds": _PROBE_SECONDS,
            "failureThreshold": math.ceil(container.startup_seconds / _PROBE_SECONDS),
        },
        "readinessProbe": {**health, "periodSeconds": 5},
        "livenessProbe": {**health, "periodSeconds": _PROBE_SECONDS, "failureThreshold": 6},
        "resources": {"requests": {"cpu": str(2 * container.gpus + 2), **gpus}, "limits": gpus},
        "securityContext": restricted,
        "volumeMounts": [
            {"name": "model", "mountPath": str(_MODEL), "readOnly": True},
            plugin,
            temporary,
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }
    return {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": 60,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 1000,
            "runAsGroup": 1000,
            "fsGroup": 1000,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "initContainers": before,
        "containers": [engine],
        "volumes": [
            {"name": "model", "persistentVolumeClaim": {"claimName": container.name}},
            {"name": "plugin", "emptyDir": {"sizeLimit": "16Mi"}},
            {"name": "tmp", "emptyDir": {}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{2 * container.gpus}Gi"}},
        ],
    }


def _environment(values: dict[str, str]) -> list[dict[str, str]]:
    return [{"name": name, "value": value} for name, value in values.items()]


class _Plain(yaml.SafeDumper):
    """YAML without anchors: what is shared here is written out, as people and tools expect it."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 - the library's signature
        return True


def _yaml(document: dict[str, Any]) -> str:
    return yaml.dump(document, Dumper=_Plain, sort_keys=False, allow_unicode=True, width=110)
