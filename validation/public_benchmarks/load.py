"""From names that lm-eval knows to tasks with their data: from a local folder, or from the hub."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from validation.document import Document
from validation.errors import MeasurementError

FEWSHOT_SEED = 1234
"""lm-eval's own default."""


class TaskData(Document):
    """What one task asked, and from which data."""

    task: str
    dataset: str
    """As the task names it on the hub."""
    config: str | None
    split: str
    revision: str | None
    """Commit of the data set, where the files tell it."""
    fingerprint: str | None
    """That the `datasets` library gives the split."""
    items: int
    items_digest: str
    """Of the rows asked, in their order, as the data set has them."""
    fewshot: int
    settings: dict[str, Any]
    """How the task generates, or how it is scored."""


def load_tasks(
    names: Sequence[str],
    *,
    data: Path | None = None,
    include: Path | None = None,
    fewshot: int | None = None,
    unsafe_code: bool = False,
    metadata: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The tasks by name, groups, tags and patterns (`cmmlu_*`) resolved, each with its data loaded.

    Args:
        data: folder with data sets as `<organisation>/<name>`, before the hub.
        include: folder with task definitions of the user's own (YAML), before lm-eval's.
        fewshot: examples in the prompt instead of what each task says.
        unsafe_code: allow tasks that run code which the model wrote.

    Raises:
        MeasurementError: a name that is not known, data that is not here (with the command that gets it), a
            task that would run generated code, or needs images.
    """
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    meta = dict(metadata or {})
    manager = None
    if include is not None:
        # Reading lm-eval's 14,000 definitions takes ten seconds; one's own may be all that is asked for.
        manager = TaskManager(include_path=str(include), include_defaults=False, metadata=meta)
    if manager is None or any(not manager.match_tasks([name]) for name in names):
        manager = TaskManager(include_path=str(include) if include else None, metadata=meta)
    index = manager.task_index
    wanted: dict[str, dict[str, Any]] = {}
    for name in names:
        matches = [name] if name in index else manager.match_tasks([name])
        if not matches:
            raise MeasurementError(f"lm-eval knows no task {name!r}", "List them with `lm-eval ls tasks`.")
        for match in matches:
            wanted |= dict(_leaves(index, match, {}))
    refused = sorted(task for task, own in wanted.items() if _plain(index[task], own).get("unsafe_code"))
    if refused and not unsafe_code:
        raise MeasurementError(
            f"{', '.join(refused)} would run code that the model wrote on this machine",
            "Leave them out, or allow it with --allow-code-execution, in a container without secrets.",
        )
    tasks, missing = dict[str, Any](), dict[str, list[str]]()
    for task, overrides in sorted(wanted.items()):
        source = str(_plain(index[task], overrides).get("dataset_path"))
        try:
            spec = _config(index[task]) | overrides | {"task": task}
            if data is not None and spec.get("dataset_path") and (data / source).is_dir():
                spec["dataset_path"] = str((data / source).resolve())
            loaded = manager.load([spec])["tasks"][task]
        except ModuleNotFoundError as err:
            raise MeasurementError(
                f"task {task} needs a package that is not here: {err}",
                f"Install it, or lm-eval's extra for the task: pip install 'lm_eval[{task.split('_')[0]}]'.",
            ) from None
        except Exception as err:  # whatever the data's reader raises: no traceback for missing data
            if not _is_missing(err):
                raise MeasurementError(
                    f"task {task} with data {source}: {type(err).__name__}: {err}"
                ) from None
            missing.setdefault(source, []).append(task)
            continue
        if getattr(loaded, "MULTIMODAL", False):
            raise MeasurementError(f"{task} needs images or sound", "Leave it out.")
        if fewshot is not None:
            loaded.set_config(key="num_fewshot", value=fewshot)
        elif loaded.get_config("num_fewshot") is None:
            loaded.set_config(key="num_fewshot", value=0)
        loaded.set_fewshot_seed(seed=FEWSHOT_SEED)
        loaded.config.metadata = {**(loaded.config.metadata or {}), "dataset": source}
        tasks[task] = loaded
    if missing:
        raise _not_here(missing, data)
    return tasks


def describe(
    tasks: Mapping[str, Any], limit: int | None, expected: Mapping[str, str] | None = None
) -> tuple[TaskData, ...]:
    """What is recorded of the loaded tasks' data, by name.

    Args:
        limit: first N items of each task.
        expected: digests of items by task, as an earlier run recorded them.

    Raises:
        MeasurementError: the rows of a task are not those expected, or a digest names no task that is run.
    """
    found = tuple(_data_of(task, limit) for _, task in sorted(tasks.items()))
    digests = {data.task: data.items_digest for data in found}
    for task, digest in (expected or {}).items():
        if task not in digests:
            raise MeasurementError(f"a digest is given for {task}, which is not run")
        if digests[task] != digest:
            raise MeasurementError(
                f"the data of {task} is {digests[task]}, not {digest}",
                "Take the revision that was measured, or leave the digest out.",
            )
    return found


def _data_of(task: Any, limit: int | None) -> TaskData:
    config = task.config
    digest, items = hashlib.sha256(), 0
    for _, row in task.doc_iterator(limit=limit):
        digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False, default=str).encode() + b"\n")
        items += 1
    split = config.test_split or config.validation_split
    rows = task.dataset[split] if isinstance(task.dataset, dict) and split in task.dataset else None
    return TaskData(
        task=task.task_name,
        dataset=config.metadata["dataset"],
        config=config.dataset_name,
        split=str(split),
        revision=_revision(config.dataset_path, rows),
        fingerprint=getattr(rows, "_fingerprint", None),
        items=items,
        items_digest="sha256:" + digest.hexdigest(),
        fewshot=task.get_config("num_fewshot") or 0,
        settings={
            "output_type": task.OUTPUT_TYPE,
            "version": str(task.VERSION),
            **(config.generation_kwargs or {} if task.OUTPUT_TYPE == "generate_until" else {}),
        },
    )


def _leaves(
    index: Mapping[str, Any], name: str, overrides: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(task, its group's overrides) of everything below a name."""
    entry = index.get(name)
    if entry is None:
        raise MeasurementError(f"lm-eval knows no task {name!r}", "List them with `lm-eval ls tasks`.")
    if entry.kind.name == "TAG":
        for task in sorted(entry.tags):
            yield from _leaves(index, task, overrides)
    elif entry.kind.name == "GROUP":
        yield from _members(index, entry.cfg, overrides)
    else:
        yield name, overrides


def _members(
    index: Mapping[str, Any], group: Mapping[str, Any], overrides: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    for member in group.get("task") or ():
        if isinstance(member, str):
            yield from _leaves(index, member, overrides)
            continue
        own = {k: v for k, v in member.items() if k not in ("task", "group", "aggregate_metric_list")}
        below = member.get("group") or member.get("task")
        if isinstance(below, str) and below in index:
            yield from _leaves(index, below, overrides | own)
        else:
            yield from _members(index, member, overrides | own)


def _config(entry: Any) -> dict[str, Any]:
    from lm_eval.tasks._yaml_loader import load_yaml

    if entry.yaml_path is None:
        return dict(entry.cfg or {})
    loaded: dict[str, Any] = load_yaml(entry.yaml_path, resolve_func=True)
    return {k: v for k, v in loaded.items() if k not in ("tag", "group", "task_list")}


def _plain(entry: Any, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A definition without the code that it names: that may need packages, or run what it should not."""
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(entry.yaml_path, resolve_func=False) if entry.yaml_path else (entry.cfg or {})
    return {**config, **overrides}


def _is_missing(err: Exception) -> bool:
    """Missing data, as the `datasets` library and the hub's client tell it, here or a cause further down."""
    seen: BaseException | None = err
    while seen is not None:
        if isinstance(seen, OSError) or type(seen).__name__ in (
            "LocalEntryNotFoundError",
            "OfflineModeIsEnabled",
        ):
            return True
        if isinstance(seen, ValueError) and str(seen).startswith("Couldn't find cache"):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _not_here(missing: Mapping[str, Sequence[str]], data: Path | None) -> MeasurementError:
    folder = data if data is not None else Path("data")
    said = "; ".join(
        f"{source} ({', '.join(tasks[:3])}{' …' if len(tasks) > 3 else ''})"
        for source, tasks in sorted(missing.items())
    )
    commands = " && ".join(
        f"hf download --repo-type dataset {source} --local-dir {folder / source}"
        if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source)
        else f"put the files of {source} in place"
        for source in sorted(missing)
    )
    return MeasurementError(
        f"data sets that are neither here nor to be reached: {said}",
        f"Where there is a network: {commands}; then give --data {folder}.",
    )


def _revision(path: str | None, rows: Any) -> str | None:
    """The data set's commit: noted by `hf download --local-dir`, or in the cache's path."""
    if path and Path(path).is_dir():
        notes = sorted((Path(path) / ".cache" / "huggingface" / "download").rglob("*.metadata"))
        commits = {note.read_text().split("\n", 1)[0].strip() for note in notes}
        return commits.pop() if len(commits) == 1 else None
    for file in getattr(rows, "cache_files", None) or ():
        parent = Path(str(file.get("filename", ""))).parent.name
        if re.fullmatch(r"[0-9a-f]{40}", parent):
            return parent
    return None
