"""Strings that open accounts: tokens and private keys in files that are about to be public.

Each kind is looked for by its fixed beginning, so that the millions of bytes of a tokenizer cost a search for
a dozen short strings; what follows must have the length, alphabet and mixture of the real thing, so that a
vocabulary, a function's name or a placeholder (`hf_xxxx…`) is none. Formats: the providers' documentation of
their secret scanning.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_WORD = re.compile(rb"[A-Za-z0-9_-]\Z")
"""What may not come before: `task-…` is no `sk-…`; and no run of such characters is looked at twice."""
_ESCAPE = re.compile(rb"\\([nrtbf]|u[0-9A-Fa-f]{4})\Z")
"""In JSON the character before may be written with letters."""
_EXAMPLES = (b"AKIAIOSFODNN7EXAMPLE",)
"""What documentation prints in place of a secret."""


@dataclass(frozen=True)
class _Kind:
    what: str
    begins: bytes
    form: re.Pattern[bytes]
    sorts: int
    """Of small letters, capitals and digits: how many must occur, as they do in random text."""


def _kind(what: str, begins: str, rest: str, sorts: int = 0) -> _Kind:
    return _Kind(what, begins.encode(), re.compile(re.escape(begins).encode() + rest.encode()), sorts)


_KINDS = (
    _kind("a Hugging Face token", "hf_", r"[A-Za-z0-9]{30,60}(?![A-Za-z0-9_])", 2),
    _kind("a Hugging Face organisation token", "api_org_", r"[A-Za-z0-9]{30,60}(?![\w])", 2),
    _kind(
        "a ModelScope token", "ms-", r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}(?![\w-])"
    ),
    _kind("a secret key (sk-…)", "sk-", r"[A-Za-z0-9_-]{32,250}(?![\w-])", 3),
    _kind("an AWS access key", "AKIA", r"[A-Z0-9]{16}(?![\w])"),
    _kind("an AWS access key", "ASIA", r"[A-Z0-9]{16}(?![\w])"),
    *(_kind("a GitHub token", f"gh{kind}_", r"[A-Za-z0-9]{36,255}(?![\w])", 2) for kind in "pousr"),
    _kind("a GitHub token", "github_pat_", r"[A-Za-z0-9_]{60,255}(?![\w])", 2),
    _kind("a GitLab token", "glpat-", r"[A-Za-z0-9_-]{20,64}(?![\w-])", 2),
    _kind("a Google API key", "AIza", r"[A-Za-z0-9_-]{35}(?![\w-])", 3),
    *(_kind("a Slack token", f"xox{kind}-", r"[0-9A-Za-z-]{30,255}(?![\w-])", 2) for kind in "bpa"),
    _kind(
        "a signed web token (JWT)", "eyJ", r"[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{20,}"
    ),
    # With its body: the line alone is in many a vocabulary and manual. In JSON a line ends in `\n`.
    _kind(
        "a private key",
        "-----BEGIN ",
        r"(?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----(?:[^-]{0,200}?(?:\\n|\\r|\s))"
        r"[A-Za-z0-9+/]{40,}",
    ),
)


def secret_in(data: bytes) -> str | None:
    """What secret a file's bytes seem to hold, and at which byte, or None. The secret itself is not told."""
    for kind in _KINDS:
        at = data.find(kind.begins)
        while at >= 0:
            before = data[max(0, at - 6) : at]
            if (
                (not _WORD.search(before) or _ESCAPE.search(before))
                and (match := kind.form.match(data, at))
                and not match[0].startswith(_EXAMPLES)
                and _random(match[0][len(kind.begins) :], kind.sorts)
            ):
                return f"it holds what looks like {kind.what} (at byte {at})"
            at = data.find(kind.begins, at + 1)
    return None


def _random(text: bytes, sorts: int) -> bool:
    found = [re.search(sort, text) for sort in (rb"[a-z]", rb"[A-Z]", rb"[0-9]")]
    return sorts == 0 or (sum(map(bool, found)) >= sorts and len(set(text)) >= 10)
