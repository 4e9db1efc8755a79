"""The last step: the bundle that came back from the hub is served and asked one question."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from packager.release.served import Served
from packager.release.workspace import Workspace

if TYPE_CHECKING:
    from validation.tasks import Item

RECORD = "answer.json"


@dataclass(frozen=True)
class FirstAnswer:
    """A question with a known answer, put to the downloaded bundle, and what it said."""

    subject: str
    """Digest of what was served."""
    question: str
    answer: str
    expected: str
    right: bool
    kept: bool = field(default=False, compare=False)
    """It was asked in an earlier run."""


def ask_downloaded(served: Served, item: Item, workspace: Workspace, max_tokens: int) -> FirstAnswer:
    """Ask `item` once; the answer is kept in `work/answer.json` for as long as the bundle is the same.

    Raises:
        RemoteFailure: the engine does not start with the bundle.
        MeasurementError, ServerUnreachable: the server does not answer.
    """
    kept = kept_answer(workspace, served.subject)
    if kept is not None:
        return kept
    from validation.endpoint import Sampling
    from validation.tasks.scoring import extract_answer, is_correct

    # A cache of its own: this answer is to come from the downloaded bytes, whatever was measured before.
    target = served.target(workspace.work / "first-answer")
    [completion] = target.ask([item.request], Sampling(max_tokens=max_tokens))
    answer = FirstAnswer(
        subject=served.subject,
        question=item.messages[-1].content,
        answer=completion.text,
        expected=item.answer,
        right=is_correct(extract_answer(completion.text), item.answer),
    )
    document: dict[str, Any] = asdict(answer)
    del document["kept"]
    workspace.write_json(RECORD, document)
    return answer


def kept_answer(workspace: Workspace, subject: str) -> FirstAnswer | None:
    """The answer of an earlier run, if it was given by the same bytes."""
    record = workspace.read_json(RECORD)
    if record.get("subject") != subject:
        return None
    return FirstAnswer(**record, kept=True)
