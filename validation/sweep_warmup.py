"""A few unmeasured requests before a cell, which also show whether a server answers at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import httpx

from validation.document import resolve_url
from validation.endpoint import Target
from validation.sweep_model import Failure, ServingFailed

OUTPUT_TOKENS = 8
_CONNECT_S = 10.0


def warm_up(
    target: Target,
    texts: Sequence[str],
    *,
    stall_s: float,
    log_tail: Callable[[], tuple[str, ...]] = lambda: (),
) -> None:
    """Send all texts at once, as they are, each answered with `OUTPUT_TOKENS` tokens at most.

    Raises:
        ServingFailed: `stalled` if no byte came for `stall_s` seconds, `requests failed` if one was refused
            or broken off.
    """
    url = resolve_url(target.url)
    with (
        httpx.Client(
            base_url=url,
            timeout=httpx.Timeout(stall_s, connect=_CONNECT_S, pool=None),
            limits=httpx.Limits(max_connections=None),
            trust_env=False,
        ) as client,
        ThreadPoolExecutor(len(texts)) as pool,
    ):
        for failure in pool.map(lambda text: _one(client, target, text, stall_s), texts):
            if failure is not None:
                raise ServingFailed(failure.model_copy(update={"log_tail": log_tail()}))


def _one(client: httpx.Client, target: Target, text: str, stall_s: float) -> Failure | None:
    body = {
        "model": target.model,
        "prompt": text,
        "max_tokens": OUTPUT_TOKENS,
        "temperature": 0.0,
        "stream": True,
    }
    try:
        with client.stream("POST", "/v1/completions", json=body) as reply:
            if reply.status_code != 200:
                said = " ".join(reply.read().decode(errors="replace").split())[:300]
                return Failure(kind="requests failed", message=f"HTTP {reply.status_code}: {said}")
            for _ in reply.iter_bytes():
                pass
    except httpx.ReadTimeout:
        return Failure(kind="stalled", message=f"a request was taken, and no token came for {stall_s:g} s")
    except httpx.TransportError as err:
        return Failure(kind="requests failed", message=f"{type(err).__name__}: {err}")
    return None
