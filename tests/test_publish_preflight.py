"""Before anything is written: all that stands in the way at once, and the very calls that would be made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, constants
from tiny_bundle import Stages, make_stages

from packager.errors import GateFailed, PackagerError, RemoteFailure
from packager.publish.hub import publish
from packager.publish.hub_accounts import Account
from packager.publish.hub_calls import dry_run
from packager.publish.loopback_hub import LoopbackHub
from validation.gates import at_least

REPO = "org/tiny"
WRITER = Account("me", orgs={"org": "write"})


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Stages:
    return make_stages(tmp_path_factory.mktemp("stages"))


@pytest.fixture(scope="module")
def bundle(stages: Stages) -> Path:
    stages.bundle(stages.root / "bundle")
    return stages.root / "bundle"


@pytest.fixture(autouse=True)
def _client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@contextmanager
def hub_of(folder: Path, account: Account = WRITER) -> Iterator[LoopbackHub]:
    with LoopbackHub(folder, accounts={"t": account}) as hub:
        yield hub


def settings(hub: LoopbackHub, **more: Any) -> dict[str, Any]:
    return {"endpoint": hub.url, "token": "t", "progress": lambda _: None} | more


def refusal(bundle: Path, hub: LoopbackHub, **more: Any) -> PackagerError:
    with pytest.raises(PackagerError) as caught:
        publish(bundle, REPO, attempts=1, **settings(hub, **more))
    assert {method for method, _ in hub.requests} <= {"GET"}
    return caught.value


def test_everything_that_stands_in_the_way_is_told_at_once(tmp_path: Path) -> None:
    stages = make_stages(tmp_path / "stages", gates=(at_least("acceptance length", 1.1, 2.5),))
    stages.bundle(tmp_path / "b", signing_key=None)
    with hub_of(tmp_path / "hub", Account("me", role="read", orgs={"other": "write"})) as hub:
        found = refusal(tmp_path / "b", hub, collections=("org/none-0123456789abcdef01234567",))
    assert isinstance(found, GateFailed) and found.exit_code == 4
    for said in (
        "acceptance length",
        "is not signed",
        "may only read",
        "me does not belong to org",
        "there is no collection",
    ):
        assert said in found.message, found.message


@pytest.mark.parametrize(
    ("account", "says"),
    [
        (Account("me", role="read", orgs={"org": "admin"}), "may only read"),
        (Account("me", orgs={"org": "read"}), "me may only read in org"),
        (Account("me"), "me does not belong to org"),
        (
            Account("me", role="fineGrained", orgs={"org": "admin"}, scopes={"me": ("repo.write",)}),
            "may not make repositories of org",
        ),
    ],
)
def test_a_token_that_may_not_write_is_refused_before_anything_is_sent(
    account: Account, says: str, bundle: Path, tmp_path: Path
) -> None:
    with hub_of(tmp_path / "hub", account) as hub:
        found = refusal(bundle, hub)
        assert says in found.message and isinstance(found, RemoteFailure)
        assert "does not know the token" in refusal(bundle, hub, token="unknown").message


def requests_of(calls: Mapping[str, Any] | Any, head: str) -> list[tuple[str, str]]:
    """Calls to the hub itself, with the names that a new repository gives."""
    return [
        (call.method, call.path.replace("{N}", "1").replace("{COMMIT}", head))
        for call in calls
        if not call.path.startswith("(")
    ]


@pytest.mark.parametrize("xet", [True, False])
def test_a_dry_run_writes_nothing_and_lists_the_calls_that_are_then_made(
    xet: bool, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", not xet)
    with hub_of(tmp_path / "hub") as hub:
        wanted = settings(hub, tag="v1", private=True, gated="auto")
        plan = dry_run(bundle, REPO, **wanted)
        assert not hub.store.exists(REPO)
        assert [(one.method, one.path) for one in plan.asked] == [
            (method, path) for method, path in hub.requests if method == "GET"
        ]
        assert len(hub.requests) == len(plan.asked)
        asked = len(hub.requests)
        publish(bundle, REPO, **wanted)
        made = [
            (method, path)
            for method, path in hub.requests[2 * asked :]
            if (not path.startswith(("/lfs", "/storage")) and method != "PUT") or path.endswith("/settings")
        ]
        assert made == requests_of(plan.calls, hub.store.resolve(REPO, "main"))
        again = dry_run(bundle, REPO, **wanted)
        assert not any(call.writes for call in again.calls) and again.files == 0
    offline = dry_run(bundle, REPO, offline=True, progress=lambda _: None)
    assert offline.asked == () and any(call.writes for call in offline.calls)


def test_gates_collections_and_a_deprecated_tag_are_set_once(bundle: Path, tmp_path: Path) -> None:
    newer = make_stages(tmp_path / "newer", seed=1)
    newer.bundle(tmp_path / "b")
    with hub_of(tmp_path / "hub") as hub:
        api = HfApi(endpoint=hub.url, token="t")
        slug = api.create_collection("Bundles", namespace="org").slug
        publish(bundle, REPO, **settings(hub, tag="v1", collections=(slug,), gated="manual"))
        wanted = settings(hub, tag="v2", collections=(slug,), deprecate="v1", reason="a wrong template")
        for _ in range(2):
            publish(tmp_path / "b", REPO, **wanted)
        assert api.model_info(REPO).gated == "manual"
        assert [item.item_id for item in api.get_collection(slug).items] == [REPO]
        tags = {
            tag.name: api.model_info(REPO, revision=tag.name).sha for tag in api.list_repo_refs(REPO).tags
        }
        assert tags["deprecated-v1"] == tags["v1"] != tags["v2"]
        told = [d for d in api.get_repo_discussions(REPO) if not d.is_pull_request]
        assert [d.title for d in told] == ["v1 is deprecated"]
    with hub_of(tmp_path / "other") as hub:
        assert "has no tag v0 to deprecate" in refusal(bundle, hub, deprecate="v0").message
