"""Conversion by the workers of a Ray cluster: they read and convert, this process hashes, writes, keeps book.

A task is one piece of the stream: an expert's weight, or a few rows of blocks of a larger one. It comes back
as the bytes read and the bytes they became, through Ray's object store. So the digests are those of the very
bytes that were converted, the source is read once, and workers need no way to the output. Tasks are pure: one
that is lost with its worker is given to another.

The two running hashes, of source and output, bound the whole at what a thread of this machine hashes and its
network brings. A cluster pays where reading or converting is slower than that.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import metadata
from types import TracebackType
from typing import Any, Self

from packager import __version__
from packager.checkpoint.folder import LocalFolder
from packager.checkpoint.source import Checkpoint, TensorReader
from packager.errors import BadInput, PackagerError, RemoteFailure, UsageProblem
from packager.quantize.kernel import Kernel
from packager.quantize.stream import Converted, TensorWork, convert_part

_ATTEMPTS = 6
"""How many workers may be lost over one piece: a piece that takes them all down is at fault itself."""
_FIRST_WAIT_S = 0.25
"""Before a lost piece is given out again, doubled each time: that a node died is not known at once."""
_POLL_S = 1.0
_NODES_EVERY_S = 5.0
_CONNECT_S = 5.0
MOST_TASKS = 512
"""At once: a thread of this process waits for each."""


class _Stopped(Exception):
    """A result is not waited for any longer."""


@dataclass(frozen=True)
class _Conditions:
    """What every task of a run has in common."""

    software: dict[str, str]
    checkpoint: Checkpoint
    """Enough of it to read tensors."""
    make_kernel: Callable[..., Kernel] | None


# ---- on the workers -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Bench:
    """What a worker's process keeps from one task of a run to the next."""

    run: str
    reader: TensorReader
    kernel: Kernel | None


_bench: _Bench | None = None


def _software() -> dict[str, str]:
    return {"packager": __version__, "torch": metadata.version("torch")}


def _set_up(run: str, conditions: _Conditions) -> _Bench:
    """Raises UsageProblem, BadInput: this node cannot take part."""
    node = socket.gethostname()
    if (found := _software()) != conditions.software:
        raise UsageProblem(
            f"{node} has {_listed(found)}; this machine has {_listed(conditions.software)}",
            "Install the same versions on all nodes: other ones may round otherwise.",
        )
    folder = conditions.checkpoint.folder
    if folder.path is not None and not folder.path.is_dir():
        raise BadInput(
            f"{node} has no {folder.path}",
            "All nodes must see the source under the same path. Share it, or read it from hf://.",
        )
    make = conditions.make_kernel
    kernel = make(progress=lambda _: None) if make else None
    if kernel:
        kernel.enter_thread()
    return _Bench(run, conditions.checkpoint.reader(), kernel)


def _convert_at_worker(
    run: str, conditions: list[Any], work: TensorWork, begin: int, end: int, written: bool, hashed: bool
) -> Converted | PackagerError:
    """The task. `conditions` holds the reference to them alone, so that they travel once a worker.

    An expected failure is a result: it is not tried again, and arrives as it was raised.
    """
    global _bench
    try:
        import ray

        if _bench is None or _bench.run != run:
            _bench = _set_up(run, ray.get(conditions[0]))
        return convert_part(_bench.reader, _bench.kernel, work, begin, end, written=written, hashed=hashed)
    except PackagerError as err:
        return err


def _listed(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


# ---- here -----------------------------------------------------------------------------------------------


class RayCluster:
    """A connection to a running cluster. Use it in a `with` block; nothing of it runs on after that."""

    def __init__(self, address: str | None) -> None:
        """`address` is HOST:PORT; None: what RAY_ADDRESS says. Connects on entering.

        Raises:
            UsageProblem: Ray is not installed, or in another version than on the cluster; no usable address.
            RemoteFailure: no cluster answers there, or this machine is none of its nodes.
        """
        self._address = address or os.environ.get("RAY_ADDRESS", "")
        self._own = False

    def __enter__(self) -> Self:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ModuleNotFoundError as err:
            if err.name != "ray":
                raise
            raise UsageProblem("ray is not installed", "pip install 'moe-packager[ray]'") from None
        if not ray.is_initialized():
            self._connect()
            self._own = True
        self.cpus = max(sum(int(node["Resources"]["CPU"]) for node in self.nodes()), 1)
        here = ray.get_runtime_context().get_node_id()
        stores = [n["Resources"].get("object_store_memory", 0) for n in ray.nodes() if n["NodeID"] == here]
        self.object_bytes = int(sum(stores))
        """Shared memory of this machine's node, through which results come."""
        return self

    def _connect(self) -> None:
        import ray

        _require_listener(self._address)
        logging.getLogger("ray").setLevel(logging.CRITICAL)
        try:
            ray.init(
                address=self._address,
                log_to_driver=False,
                logging_level=logging.CRITICAL,
                configure_logging=False,
            )
        except Exception as err:
            reason = (str(err).strip() or type(err).__name__).splitlines()[0]
            if "ersion mismatch" in str(err):
                raise UsageProblem(
                    f"the cluster at {self._address} runs other versions: {reason}",
                    "Install the same versions of Python and Ray on all nodes.",
                ) from None
            raise RemoteFailure(
                f"cannot join the Ray cluster at {self._address}: {reason}",
                "Run the command on one of its machines (`ray start --address=...` makes this one).",
            ) from None

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        import ray

        if self._own:
            ray.shutdown()

    def nodes(self) -> list[dict[str, Any]]:
        """Nodes that are alive and have processors to give, as `ray.nodes` describes them."""
        import ray

        return [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]

    def title(self) -> str:
        """What the cluster is, for people."""
        nodes = self.nodes()
        cpus = sum(int(node["Resources"]["CPU"]) for node in nodes)
        return f"Ray: {_count(len(nodes), 'node')} with {_count(cpus, 'CPU')}"

    def conversion(self, checkpoint: Checkpoint, make_kernel: Callable[..., Kernel] | None) -> RayConversion:
        """Conversion of parts of `checkpoint`; each worker makes a kernel of its own."""
        return RayConversion(self, checkpoint, make_kernel)


class RayConversion:
    """`stream.Away` on a cluster."""

    def __init__(
        self, cluster: RayCluster, checkpoint: Checkpoint, make_kernel: Callable[..., Kernel] | None
    ) -> None:
        import ray

        self._cluster = cluster
        self._run = uuid.uuid4().hex
        self._conditions = ray.put(_Conditions(_software(), _readable_elsewhere(checkpoint), make_kernel))
        # Ray's own retries would neither be counted nor end where ours do.
        options = {"num_cpus": 1, "max_retries": 0, "scheduling_strategy": "SPREAD"}
        self._task = ray.remote(**options)(_convert_at_worker)
        self._pending: set[Any] = set()
        self._guard = threading.Lock()
        self._stopped = threading.Event()
        self._lost: dict[str, str] = {}
        """Tensors to be told of as lost -> why."""
        self._redone: set[str] = set()
        self._title, self._ask_at = cluster.title(), time.monotonic() + _NODES_EVERY_S

    def convert(self, work: TensorWork, begin: int, end: int, *, written: bool, hashed: bool) -> Converted:
        """One piece by any worker, by another if that one is lost.

        Raises:
            PackagerError: what `convert_part` raised there.
            RemoteFailure: too many workers were lost over it, or none is left.
        """
        from ray import exceptions

        lost = (
            exceptions.WorkerCrashedError,
            exceptions.NodeDiedError,
            exceptions.LocalRayletDiedError,
            exceptions.ObjectLostError,
            exceptions.OutOfMemoryError,
        )
        name, reason = work.info.name, ""
        for attempt in range(_ATTEMPTS):
            if attempt and self._stopped.wait(_FIRST_WAIT_S * 2 ** (attempt - 1)):
                raise _Stopped
            try:
                with self._started(work, begin, end, written, hashed) as task:
                    found = self._result(task)
            except lost as err:
                reason = type(err).__name__
                with self._guard:
                    self._lost[name] = reason
            except exceptions.RayTaskError as err:
                if isinstance(err.cause, ModuleNotFoundError):
                    raise UsageProblem(
                        f"a node of the cluster lacks a package: {err.cause}",
                        "Install moe-packager[quantize,ray] in the same versions on all nodes.",
                    ) from None
                raise
            except exceptions.RayError as err:
                if self._stopped.is_set():
                    raise _Stopped from None
                first = (str(err).strip() or type(err).__name__).splitlines()[0]
                raise RemoteFailure(
                    f"the Ray cluster failed at {name}: {first}", "Run the same command again: it goes on."
                ) from None
            else:
                if isinstance(found, PackagerError):
                    raise found
                return found
        raise RemoteFailure(
            f"{_ATTEMPTS} workers in a row were lost over {name} ({reason})",
            "Look at the memory of the nodes; the same command goes on with the first unfinished tensor.",
        )

    @contextlib.contextmanager
    def _started(self, work: TensorWork, begin: int, end: int, written: bool, hashed: bool) -> Iterator[Any]:
        task = self._task.remote(self._run, [self._conditions], work, begin, end, written, hashed)
        with self._guard:
            self._pending.add(task)
        try:
            yield task
        finally:
            with self._guard:
                self._pending.discard(task)

    def _result(self, task: Any) -> Converted | PackagerError:
        import ray

        while not self._stopped.is_set():
            # Waiting for the end of a task does not fetch its result, so giving up on the wait costs nothing.
            if not ray.wait([task], timeout=_POLL_S, fetch_local=False)[0]:
                continue
            with contextlib.suppress(ray.exceptions.GetTimeoutError):
                found: Converted | PackagerError = ray.get(task, timeout=10 * _POLL_S)
                return found
        raise _Stopped

    def news(self) -> list[str]:
        """Lost tensors, and changes of the cluster. Raises RemoteFailure: no node is left."""
        with self._guard:
            lost, self._lost = self._lost, {}
            self._redone |= lost.keys()
        lines = []
        if lost:
            why = ", ".join(sorted(set(lost.values())))
            lines.append(
                f"workers were lost ({why}): {_count(len(lost), 'tensor')} done again by others, "
                f"{len(self._redone)} so far"
            )
        if not self._stopped.is_set() and (lost or time.monotonic() >= self._ask_at):
            # The death of a node shows a while after that of its workers.
            self._ask_at = time.monotonic() + (_POLL_S if lost else _NODES_EVERY_S)
            title = self._cluster.title()
            if title != self._title:
                self._title = title
                lines.append(title)
            if not self._cluster.nodes():
                raise RemoteFailure(
                    "no node of the Ray cluster is left to work",
                    "Start nodes, then run the same command again: finished tensors are kept.",
                )
        return lines

    def stop(self) -> None:
        """End all waiting, and cancel what still runs."""
        import ray

        self._stopped.set()
        with self._guard:
            pending = list(self._pending)
        for task in pending:
            with contextlib.suppress(Exception):
                ray.cancel(task, force=True)


def _readable_elsewhere(checkpoint: Checkpoint) -> Checkpoint:
    """What another process needs to read tensors that it is told of."""
    folder = checkpoint.folder
    if isinstance(folder, LocalFolder):
        # Another working directory; and another machine may mount the same files under another device number.
        folder = LocalFolder(folder.path.absolute())
    shards = {name: replace(header, tensors={}, metadata={}) for name, header in checkpoint.shards.items()}
    return Checkpoint(folder, shards, {})


def _require_listener(address: str) -> None:
    """Raise unless something answers at HOST:PORT: Ray itself would wait for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in host:
        raise UsageProblem(
            f"{address!r} is no address of a Ray cluster" if address else "no Ray cluster is named",
            "Give --ray-address HOST:PORT (`ray start --head` prints it), or set RAY_ADDRESS.",
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S).close()
    except (OSError, OverflowError) as err:
        raise RemoteFailure(
            f"no Ray cluster answers at {address}: {err}", "Start it with `ray start --head`."
        ) from None


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
