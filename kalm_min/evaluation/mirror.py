"""A folder that stands in for the hub's datasets: <mirror>/<owner>/<name>/<revision>/ is a repository.

The revision is in the path because nothing else would hold it: of a folder `datasets` reads whatever
is there, and the result would still name the revision that was meant. A copy is whole or absent.
Scripts are not copied, so none can run.
"""

import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from kalm_min.evaluation.plan import PlannedTask
from kalm_min.files import atomic_directory

_SHOWN = 5


def mirrored(mirror: Path, tasks: Iterable[PlannedTask]) -> list[PlannedTask]:
    """The tasks, reading the hub's datasets from the mirror.

    Raises ValueError naming the first of those that are not there.
    """
    placed = [replace(t, mirror=_folder(mirror, t)) if t.repository else t for t in tasks]
    missing = [str(task.mirror) for task in placed if task.mirror and not task.mirror.is_dir()]
    if missing:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise ValueError(
            f"--datasets: expected {', '.join(missing[:_SHOWN])}{more}, found none; the same command "
            "with --prefetch, on a machine with network, copies them"
        )
    return placed


def _folder(mirror: Path, task: PlannedTask) -> Path:
    return mirror.absolute() / task.repository / task.revision


def prefetch(mirror: Path, tasks: Iterable[PlannedTask], stream: TextIO) -> list[str]:
    """Copy the repositories of tasks from the hub, each at its task's revision; what is there stays.

    Returns:
        A sentence for each that could not be had. The same call again goes on with its files.
    """
    from huggingface_hub import snapshot_download

    failures: list[str] = []
    wanted = {_folder(mirror, task): task for task in tasks if task.repository}
    for number, (folder, task) in enumerate(wanted.items(), start=1):
        what = f"{task.repository} at {task.revision[:12]} ({task.name})"
        stream.write(f"[{number}/{len(wanted)}] {what}\n")
        stream.flush()
        if folder.is_dir():
            continue
        part = folder.with_name(f".{task.revision}.part")
        try:
            snapshot_download(
                task.repository,
                repo_type="dataset",
                revision=task.revision,
                local_dir=part,
                ignore_patterns=["*.py"],
            )
        except Exception as error:  # the hub client has a dozen kinds
            failures.append(f"{what}: {' '.join(str(error).split())[:300]}")
            continue
        shutil.rmtree(part / ".cache", ignore_errors=True)  # the client's notes
        with atomic_directory(folder) as whole:
            part.replace(whole)
    return failures
