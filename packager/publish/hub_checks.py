"""What a hub says before anything is written to it: the token's rights, the repository, room for the bundle.

Every request here is a GET. What the hub will not tell (other hubs, tokens of narrow scope) is noted as not
told, never as fine.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeVar

from packager.errors import RemoteFailure, UsageProblem
from packager.publish.findings import Finding

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

FREE_PRIVATE_BYTES = 100_000_000_000
"""Private storage of an account that does not pay: huggingface.co/docs/hub/storage-limits."""
_WRITING_ROLES = ("admin", "write", "contributor")
_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class HubSettings:
    """Where on a hub a bundle goes, and what is to be set there beside the files."""

    repo_id: str
    tag: str
    private: bool = False
    gated: str | None = None
    """auto or manual; None: as it is."""
    collections: tuple[str, ...] = ()
    """Slugs, `org/name-0123…`."""
    deprecate: str | None = None
    """An older tag that this publication takes the place of."""
    reason: str | None = None
    """Why."""

    def __post_init__(self) -> None:
        for tag in (self.tag, self.deprecate):
            if tag is not None and not re.fullmatch(r"(?!-)[\w.+-]{1,100}(?<!\.lock)(?<!\.)", tag, re.ASCII):
                raise UsageProblem(f"{tag!r} cannot be a tag", "Use letters, digits and . _ + - only.")
        if self.deprecate == self.tag:
            raise UsageProblem(f"{self.tag} cannot take its own place", "Name an older tag to deprecate.")
        if self.reason and not self.deprecate:
            raise UsageProblem("a reason is given, but no tag to deprecate", "Add --deprecate TAG.")


@dataclass
class HubView:
    """What the hub said."""

    exists: bool = False
    private: bool = False
    gated: str | None = None
    head: str | None = None
    """Commit oid of main."""
    tree: dict[str, RepoFile] = field(default_factory=dict)
    """Of main, by path."""
    tags: dict[str, str] = field(default_factory=dict)
    """Tag to the commit that it names, or to its own object if it carries a message."""
    tagged: str | None = None
    """The commit that the tag to be made names already."""
    in_collections: frozenset[str] = frozenset()
    xet: bool = False
    """Contents go by Xet."""
    findings: list[Finding] = field(default_factory=list)
    not_told: list[str] = field(default_factory=list)


def look_at_hub(api: HfApi, settings: HubSettings, total_bytes: int) -> HubView:
    """Ask a hub all that a publication depends on. Without a token nothing is asked.

    Raises:
        httpx and huggingface_hub errors of a hub that cannot be reached or is out of order: see `hub_faults`.
    """
    return _Look(api, settings, total_bytes).view


def xet_usable() -> bool:
    """The client will send contents by Xet: hf_xet is there and not switched off."""
    from huggingface_hub import constants

    return not constants.HF_HUB_DISABLE_XET and find_spec("hf_xet") is not None


def remote_tree(api: HfApi, repo_id: str, revision: str) -> dict[str, RepoFile]:
    """The files of a revision, by path."""
    from huggingface_hub.hf_api import RepoFile

    listed = api.list_repo_tree(repo_id, revision=revision, recursive=True)
    return {entry.path: entry for entry in listed if isinstance(entry, RepoFile)}


class _Look:
    """One look at one hub."""

    def __init__(self, api: HfApi, settings: HubSettings, total_bytes: int) -> None:
        self.api, self.settings, self.total = api, settings, total_bytes
        self.view = HubView(xet=xet_usable())
        self.owner = settings.repo_id.split("/")[0]
        self.tokens_page = f"{api.endpoint}/settings/tokens"
        if not self.view.xet:
            self._warn(
                "hf_xet is not installed or switched off (HF_HUB_DISABLE_XET): contents go by plain LFS, "
                "and a file that is interrupted begins anew",
                "pip install hf_xet",
            )
        if not self._has_token():
            self._refuse(
                "there is no hub token",
                f"Run `hf auth login`, or set HF_TOKEN to a token that may write ({api.endpoint}"
                "/settings/tokens); in CI, make the workflow a trusted publisher of the repository.",
                UsageProblem,
            )
            return
        me = self._whoami()
        if any(found.kind is not None for found in self.view.findings):
            return  # with a token that the hub does not know, it answers every question so
        self._repository(me)
        self._collections()
        if settings.private:
            self._storage(me)

    def _warn(self, what: str, remedy: str = "") -> None:
        self.view.findings.append(Finding(what, remedy))

    def _refuse(self, what: str, remedy: str, kind: type[RemoteFailure | UsageProblem]) -> None:
        self.view.findings.append(Finding(what, remedy, kind))

    def _asked(self, what: str, ask: Callable[[], _Answer]) -> _Answer | None:
        """An answer, or None and a note if the hub refuses it to this token or does not know the question."""
        from huggingface_hub.errors import HfHubHTTPError

        try:
            return ask()
        except HfHubHTTPError as err:
            if err.response.status_code not in (400, 401, 403, 404, 405):
                raise
            self.view.not_told.append(what)
            return None

    def _has_token(self) -> bool:
        from huggingface_hub import get_token

        return bool(self.api.token or get_token())

    def _whoami(self) -> dict[str, Any] | None:
        """The account; None if the hub does not say, as for a token that was exchanged for an identity."""
        from huggingface_hub import get_token
        from huggingface_hub.errors import HfHubHTTPError

        token = str(self.api.token or get_token())
        try:
            me: dict[str, Any] = self.api.whoami()
        except HfHubHTTPError as err:
            if err.response.status_code not in (401, 403):
                raise
            if err.response.status_code == 403 or token.startswith("hf_jwt_"):
                self.view.not_told.append("whose token it is")
            else:
                self._refuse(
                    f"{self.api.endpoint} does not know the token: {_first_line(err)}",
                    f"Make a new one ({self.tokens_page}), then `hf auth login` or HF_TOKEN.",
                    RemoteFailure,
                )
            return None
        return me

    def _rights(self, me: dict[str, Any]) -> None:
        """What the account and its token may do, for a repository that has to be made."""
        token = (me.get("auth") or {}).get("accessToken") or {}
        role, name, owner = token.get("role"), me.get("name"), self.owner
        settings = self.tokens_page
        if role == "read":
            self._refuse(
                f"the token {token.get('displayName', '')!r} of {name} may only read",
                f"Make one that may write ({settings}), then `hf auth login` or HF_TOKEN.",
                RemoteFailure,
            )
        scopes = {
            str((scope.get("entity") or {}).get("name")): scope.get("permissions") or []
            for scope in (token.get("fineGrained") or {}).get("scoped") or []
        }
        if role == "fineGrained" and "repo.write" not in scopes.get(owner, []):
            self._refuse(
                f"the token {token.get('displayName', '')!r} may not make repositories of {owner}",
                f"Give it write access to the repositories of {owner} ({settings}).",
                RemoteFailure,
            )
        orgs = {org.get("name"): org.get("roleInOrg") for org in me.get("orgs") or []}
        if owner != name and owner not in orgs:
            self._refuse(
                f"{name} does not belong to {owner}",
                f"Check the name, use hf://{name}/{self.settings.repo_id.split('/')[1]}, or join {owner}.",
                RemoteFailure,
            )
        elif owner != name and orgs[owner] is not None and orgs[owner] not in _WRITING_ROLES:
            self._refuse(
                f"{name} may only read in {owner} ({orgs[owner]})",
                f"Ask an administrator of {owner} for the role write or contributor.",
                RemoteFailure,
            )

    def _repository(self, me: dict[str, Any] | None) -> None:
        from huggingface_hub.errors import RepositoryNotFoundError

        repo, view, wanted = self.settings.repo_id, self.view, self.settings
        try:
            info = self.api.repo_info(repo)
        except RepositoryNotFoundError:
            if me is not None:
                self._rights(me)
            elif "whose token it is" in view.not_told:
                self._refuse(
                    f"there is no {repo}, and this token cannot make it",
                    f"Make the repository by hand ({self.api.endpoint}/new) and name the workflow as its "
                    "trusted publisher; then run the same command again.",
                    RemoteFailure,
                )
            if wanted.deprecate:
                self._refuse_deprecation()
            return
        view.exists, view.head = True, str(info.sha)
        view.private, view.gated = bool(getattr(info, "private", False)), getattr(info, "gated", None) or None
        if not self._may_write(repo):
            return
        if wanted.private and not view.private:
            self._refuse(
                f"{repo} is public; --private makes a repository private only when it is new",
                f"Leave it out, or change it first ({self.api.endpoint}/{repo}/settings).",
                UsageProblem,
            )
        elif view.private and not wanted.private:
            self._warn(f"{repo} is private and stays so")
        if wanted.gated and view.gated and view.gated != wanted.gated:
            self._warn(f"{repo} is gated ({view.gated}); it becomes {wanted.gated}")
        view.tags = {tag.name: tag.target_commit for tag in self.api.list_repo_refs(repo).tags}
        if wanted.tag in view.tags:
            view.tagged = str(self.api.repo_info(repo, revision=wanted.tag).sha)
        if wanted.deprecate and wanted.deprecate not in view.tags:
            self._refuse_deprecation()
        view.tree = remote_tree(self.api, repo, "main")
        if ".gitignore" in view.tree:
            self._warn(f"main of {repo} holds a .gitignore, which would drop files; it is taken away first")
        if view.xet:
            self._xet_token(repo)

    def _may_write(self, repo: str) -> bool:
        """Ask the hub itself: it knows roles and scopes better than we read them."""
        from huggingface_hub.errors import HfHubHTTPError

        try:
            self.api.auth_check(repo, write=True)
        except HfHubHTTPError as err:
            if err.response.status_code in (401, 403):
                self._refuse(
                    f"the token may not write to {repo}: {_first_line(err)}",
                    f"Use one that may ({self.tokens_page}) with `hf auth login` or HF_TOKEN.",
                    RemoteFailure,
                )
                return False
            if err.response.status_code != 404:
                raise
            self.view.not_told.append(f"whether the token may write to {repo}")
        return True

    def _refuse_deprecation(self) -> None:
        tags = ", ".join(sorted(self.view.tags)) or "none"
        self._refuse(
            f"{self.settings.repo_id} has no tag {self.settings.deprecate} to deprecate",
            f"Its tags: {tags}.",
            UsageProblem,
        )

    def _xet_token(self, repo: str) -> None:
        from huggingface_hub import get_session
        from huggingface_hub.utils import (  # type: ignore[attr-defined]
            build_hf_headers,
            hf_raise_for_status,
        )

        def ask() -> bool:
            address = f"{self.api.endpoint}/api/models/{repo}/xet-write-token/main"
            hf_raise_for_status(get_session().get(address, headers=build_hf_headers(token=self.api.token)))
            return True

        if self._asked("a Xet token for this repository", ask) is None:
            self._warn(
                f"{self.api.endpoint} gives no Xet token for {repo}",
                "If the upload fails, set HF_HUB_DISABLE_XET=1: contents then go by plain LFS.",
            )

    def _collections(self) -> None:
        from huggingface_hub.errors import HfHubHTTPError

        found = set()
        for slug in self.settings.collections:
            try:
                collection = self.api.get_collection(slug)
            except HfHubHTTPError as err:
                if err.response.status_code not in (401, 403, 404):
                    raise
                self._refuse(
                    f"there is no collection {slug}, or none that this token may see",
                    f"Copy the end of its address, {self.api.endpoint}/collections/ORG/SLUG.",
                    UsageProblem,
                )
                continue
            if any(item.item_id == self.settings.repo_id for item in collection.items):
                found.add(slug)
        self.view.in_collections = frozenset(found)

    def _storage(self, me: dict[str, Any] | None) -> None:
        """Private storage is limited; the hub tells what is used, and whether the account pays."""
        mine = me is not None and me.get("name") == self.owner
        listed = self._asked(
            f"how much private storage {self.owner} uses",
            lambda: list(self.api.list_user_repos(None if mine else self.owner)),
        )
        if listed is None or me is None:
            return
        orgs = {org.get("name"): org for org in me.get("orgs") or []}
        org = orgs.get(self.owner) or {}
        pays = me.get("isPro") if mine else org.get("isEnterprise") or org.get("plan")
        used = sum(r.storage for r in listed if r.visibility == "private" and r.id != self.settings.repo_id)
        if not pays and used + self.total > FREE_PRIVATE_BYTES:
            self._warn(
                f"{self.owner} keeps {used / 1e9:.1f} GB in private repositories, and the bundle has "
                f"{self.total / 1e9:.1f} GB: more than the {FREE_PRIVATE_BYTES / 1e9:.0f} GB that are free",
                "Publish publicly, take a paid plan, or remove something.",
            )


def _first_line(err: Exception) -> str:
    text = getattr(err, "server_message", None) or str(err)
    return str(text).strip().splitlines()[0]
