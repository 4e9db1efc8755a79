"""Who may do what on the loopback hub: accounts, their tokens and roles; tokens exchanged for an identity.

The answers have the shape of the hub's own: `GET /api/whoami-v2` with role and fine-grained scopes, and
`POST /oauth/token` (RFC 8693) that gives a CI job's identity token back as a token for one repository.
"""

from __future__ import annotations

import base64
import binascii
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from packager.publish.hub_store import HubError

_GRANT = "urn:ietf:params:oauth:grant-type:token-exchange"
_WRITE = ("admin", "write", "contributor")


@dataclass(frozen=True)
class Account:
    """What a token stands for."""

    name: str = "rehearsal"
    role: str = "write"
    """Of the token: read, write or fineGrained."""
    orgs: Mapping[str, str] = field(default_factory=dict)
    """Organisation to the account's role in it: admin, write, contributor or read."""
    scopes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Of a fine-grained token: user, organisation or `org/name` to permissions such as `repo.write`."""
    paid: bool = False
    everywhere: bool = False
    """May write to every repository: the account of a hub that was told of none."""
    only_repo: str | None = None
    """Of an exchanged token: the one repository that it may write to."""

    def may_write(self, repo: str) -> bool:
        """To an existing repository, or by making it."""
        owner = repo.split("/")[0]
        if self.everywhere or self.only_repo is not None:
            return self.everywhere or self.only_repo == repo
        if self.role == "fineGrained" and not any(
            "repo.write" in self.scopes.get(entity, ()) for entity in (owner, repo)
        ):
            return False
        return self.role != "read" and (owner == self.name or self.orgs.get(owner) in _WRITE)

    def may_read(self, repo: str) -> bool:
        """A private repository."""
        owner = repo.split("/")[0]
        return self.everywhere or self.only_repo == repo or owner == self.name or owner in self.orgs

    def whoami(self) -> dict[str, Any]:
        """The hub's own document. Raises HubError 401: an exchanged token stands for no user."""
        if self.only_repo is not None:
            raise HubError(401, "Invalid username or password.")
        token: dict[str, Any] = {"displayName": "loopback", "role": self.role}
        if self.role == "fineGrained":
            token["fineGrained"] = {
                "canReadGatedRepos": False,
                "global": [],
                "scoped": [
                    {"entity": {"_id": "0" * 24, "type": _kind(name, self.name), "name": name},
                     "permissions": list(permissions)}
                    for name, permissions in self.scopes.items()
                ],
            }  # fmt: skip
        orgs = [{"type": "org", "name": n, "roleInOrg": r, "isEnterprise": self.paid, "plan": None}
                for n, r in self.orgs.items()]  # fmt: skip
        auth = {"type": "access_token", "accessToken": token}
        return {"type": "user", "name": self.name, "isPro": self.paid, "orgs": orgs, "auth": auth}


def _kind(entity: str, user: str) -> str:
    return "model" if "/" in entity else "user" if entity == user else "org"


class Accounts:
    """Tokens and what they stand for. While no account is named, every token is one that may write all."""

    def __init__(self, accounts: Mapping[str, Account] | None = None) -> None:
        self._of_token = dict(accounts or {})
        self._open = not self._of_token
        self._trusted: dict[str, str] = {}

    def of(self, authorization: str) -> Account | None:
        """The account behind an `Authorization` header, None without one. Raises HubError 401: unknown."""
        token = authorization.removeprefix("Bearer ")
        if not authorization.startswith("Bearer ") or not token:
            return None
        if token in self._of_token:
            return self._of_token[token]
        if self._open:
            return Account(everywhere=True)
        raise HubError(401, "Invalid username or password.")

    def trust(self, repo: str, subject: str) -> None:
        """Let the CI job with this `sub` claim publish to `repo`, which must be there."""
        self._trusted[repo] = subject

    def exchange(self, asked: Mapping[str, Any], audience: str) -> dict[str, Any]:
        """The answer to `POST /oauth/token`. The signature of the identity token is not checked here.

        Raises:
            HubError: 400, the grant, the audience or the subject is not the one that is trusted.
        """
        repo = str(asked.get("resource"))
        claims = _claims(str(asked.get("subject_token")))
        if asked.get("grant_type") != _GRANT:
            raise HubError(400, "unsupported_grant_type")
        if claims.get("aud") != audience or claims.get("sub") != self._trusted.get(repo, ""):
            raise HubError(400, f"invalid_grant: no trusted publisher of {repo} matches this identity")
        token = f"hf_jwt_{secrets.token_hex(8)}"
        self._of_token[token] = Account("", only_repo=repo)
        return {"access_token": token, "token_type": "bearer", "expires_in": 3600}


def _claims(token: str) -> dict[str, Any]:
    """The claims of a JWT, or none."""
    try:
        payload = token.split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    except (IndexError, ValueError, binascii.Error):
        return {}
    return claims if isinstance(claims, dict) else {}
