"""What the hub client raises, in our words: faults that may pass, and failures; and how long to wait."""

from __future__ import annotations

import json
import logging
import random
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from packager.errors import RemoteFailure, UsageProblem

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

ATTEMPTS = 6
"""How often the same bytes are asked for while nothing comes."""
FIRST_WAIT_S = 1.0
LONGEST_WAIT_S = 60.0
LONGEST_ASKED_WAIT_S = 600.0
"""How long a hub may ask us to wait (Retry-After)."""
_ENOUGH = 1 << 16
"""Bytes after which an attempt counts as one that got on."""
_AGAIN = "Check the network, then run the same command again."
WRITE_AGAIN = (
    "Run the same command again: it goes on where it stopped, and main is not changed until the end."
)
_log = logging.getLogger(__name__)


class PassingFault(RemoteFailure):
    """A fault that may be gone at the next attempt."""

    def __init__(self, message: str, remedy: str = _AGAIN, *, asked_wait_s: float = 0.0) -> None:
        super().__init__(message, remedy)
        self.asked_wait_s = asked_wait_s
        """Seconds that the hub asks to wait."""


class Patience:
    """Counts the faults in a row and waits after each, longer every time and never as long as others.

    Args:
        attempts: how many there are in all; None: ATTEMPTS.
        first_wait_s: seconds before the second attempt, doubled before each later one; None: FIRST_WAIT_S.
        say: told of each fault that is met with another attempt; None: the log.
    """

    def __init__(
        self,
        attempts: int | None = None,
        first_wait_s: float | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self._attempts = ATTEMPTS if attempts is None else attempts
        self._first_wait_s = FIRST_WAIT_S if first_wait_s is None else first_wait_s
        self._say = say or _log.info
        self._faults = self._got = 0

    def progress(self, count: int) -> None:
        """Bytes came: after enough of them the count begins anew."""
        self._got += count
        if self._got >= _ENOUGH:
            self._faults = self._got = 0

    def wait(self, fault: PassingFault) -> None:
        """Sleep before the next attempt. Raises RemoteFailure: there have been enough."""
        self._faults += 1
        if self._faults >= self._attempts:
            raise RemoteFailure(f"{fault.message} ({self._faults} attempts)", fault.remedy) from None
        # Many readers fail at once; the random part keeps them from coming back at once.
        own = min(self._first_wait_s * 2 ** (self._faults - 1), LONGEST_WAIT_S) * random.uniform(0.5, 1.0)
        seconds = max(own, min(fault.asked_wait_s, LONGEST_ASKED_WAIT_S))
        self._say(f"{fault.message}; trying again in {seconds:.1f} s")
        time.sleep(seconds)


@contextmanager
def hub_faults(repo: str, endpoint: str, *, writing: bool = False) -> Iterator[None]:
    """Turn what the hub client raises into PassingFault, RemoteFailure or UsageProblem.

    Args:
        writing: what is done changes the repository and can be taken up again where it stopped.
    """
    import httpx
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
        OIDCError,
        RepositoryNotFoundError,
    )

    again = WRITE_AGAIN if writing else _AGAIN
    try:
        yield
    except LocalTokenNotFoundError:
        raise UsageProblem(
            "there is no hub token", "Run `hf auth login`, or set HF_TOKEN to a token that may write."
        ) from None
    except OIDCError as err:
        raise UsageProblem(
            f"no token for this CI job's identity: {str(err).splitlines()[0]}",
            "Give the job `permissions: id-token: write`, or HF_TOKEN from its secrets.",
        ) from None
    except OfflineModeIsEnabled:
        raise UsageProblem("the hub client is switched off by HF_HUB_OFFLINE", "Unset it.") from None
    except HFValidationError as err:
        raise UsageProblem(str(err), "Write hf://organisation/name@revision.") from None
    except GatedRepoError:
        raise RemoteFailure(
            f"{repo} is gated: {endpoint} gives it to those who accepted its conditions",
            f"Accept them at {endpoint}/{repo}, then run `hf auth login` or set HF_TOKEN.",
        ) from None
    except RepositoryNotFoundError as err:
        raise RemoteFailure(
            f"{endpoint} answered {err.response.status_code}: no repository {repo}, or a private one",
            "Check the name; for a private one run `hf auth login` or set HF_TOKEN.",
        ) from None
    except HfHubHTTPError as err:
        raise _of_status(err, repo, endpoint, writing) from None
    except (httpx.UnsupportedProtocol, httpx.InvalidURL) as err:
        raise UsageProblem(f"{endpoint} is no address of a hub: {err}", "Correct HF_ENDPOINT.") from None
    except httpx.ConnectError as err:
        raise _unreachable(err, endpoint, again) from None
    except httpx.TimeoutException as err:
        raise PassingFault(f"{endpoint} does not answer ({type(err).__name__})", again) from None
    except (httpx.TransportError, ConnectionError, TimeoutError) as err:
        raise PassingFault(
            f"the connection to {endpoint} broke: {err or type(err).__name__}", again
        ) from None
    except httpx.HTTPError as err:
        raise RemoteFailure(f"{endpoint} cannot be read from: {err}", again) from None
    except RuntimeError as err:
        # The client's session is shared; it closes it when a connection cannot be made elsewhere. It wraps
        # what breaks within an upload, and hf_xet raises plain RuntimeErrors of its own.
        if not writing and "closed" not in str(err):
            raise
        raise PassingFault(f"the connection to {endpoint} broke: {err}", again) from None
    except json.JSONDecodeError as err:
        # An answer of the API that was cut short does not parse.
        raise PassingFault(f"{endpoint} sent an answer that makes no sense: {err}", again) from None
    except (ValueError, KeyError) as err:
        # One that parses and lacks what belongs in it: the client's own words for a malformed upload answer.
        if not writing:
            raise
        raise PassingFault(f"{endpoint} sent an answer that makes no sense: {err!r}", again) from None


def _unreachable(err: Exception, endpoint: str, again: str) -> RemoteFailure:
    """What kept a connection from being made, as far as it can be told."""
    cause: BaseException | None = err
    while cause is not None:
        if isinstance(cause, socket.gaierror):
            host = urlsplit(endpoint).hostname
            return PassingFault(
                f"no address is known for {host} ({cause.strerror})",
                f"Check the network and HF_ENDPOINT ({endpoint}), then run the same command again.",
            )
        if isinstance(cause, ssl.SSLCertVerificationError):
            return RemoteFailure(
                f"the certificate of {endpoint} is not trusted: {cause.verify_message}",
                "If a proxy of your organisation stands between, point SSL_CERT_FILE to its certificates.",
            )
        cause = cause.__cause__ or cause.__context__
    return PassingFault(f"no hub can be reached at {endpoint}: {err}", again)


def _of_status(err: HfHubHTTPError, repo: str, endpoint: str, writing: bool) -> RemoteFailure:
    status = err.response.status_code if err.response is not None else 0
    message = f"{endpoint} answered {status} for {repo}: {_reason(err)}"
    # Two who write at once get a conflict, which the next attempt sees the outcome of.
    if status in (408, 425, 429) or status >= 500 or (writing and status in (409, 412)):
        again = WRITE_AGAIN if writing else _AGAIN
        wait = asked_wait_s(err.response.headers)
        if wait:
            message += f" (wait {wait:.0f} s)"
        return PassingFault(message, again, asked_wait_s=wait)
    if status in (401, 403):
        may = "write to" if writing else "read"
        return RemoteFailure(message, f"Run `hf auth login`, or set HF_TOKEN to a token that may {may} it.")
    if status == 402:
        return RemoteFailure(
            message, "The account's storage is used up: take a larger plan or remove something."
        )
    if status == 413:
        return RemoteFailure(
            message, "A file or the commit is larger than the hub takes: use smaller shards."
        )
    return RemoteFailure(message, WRITE_AGAIN if writing else "Check the name and the revision.")


def _reason(err: HfHubHTTPError) -> str:
    """What the hub says, in one line; what its status means where it says nothing or sends a web page."""
    if err.server_message and err.server_message.strip():
        return str(err.server_message).strip().splitlines()[0]
    response = err.response
    if response is not None and "html" in response.headers.get("Content-Type", ""):
        return f"{_phrase(response.status_code)}, with a web page (maintenance, or a proxy that answers)"
    own = str(err).strip().splitlines()[0]
    # Of httpx, which names the address instead of the fault.
    return _phrase(response.status_code) if " for url " in own else own


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase.lower()
    except ValueError:
        return "no reason given"


def asked_wait_s(headers: Mapping[str, str]) -> float:
    """Seconds an answer asks to wait: `Retry-After` (a number or a date) or `RateLimit: …;r=0;t=SECONDS`."""
    from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]

    stated = headers.get("Retry-After", "").strip()
    if stated.isascii() and stated.isdigit():
        return float(stated)
    if stated:
        try:
            return max(0.0, parsedate_to_datetime(stated).timestamp() - time.time())
        except ValueError:
            return 0.0
    limit = parse_ratelimit_headers(headers)
    return float(limit.reset_in_seconds) if limit is not None and limit.remaining == 0 else 0.0
