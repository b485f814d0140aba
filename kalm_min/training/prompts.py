"""The prompts that a model stores when it is finished: those with which it was trained."""

from collections.abc import Mapping, Sequence

from kalm_min.data import TrainingData
from kalm_min.settings import fill_template

_KINDS = ("query", "document")
_LOOKED_AT = 100  # lines of a task, evenly spread, that tell its instruction


def trained_prompts(
    data: TrainingData, draws: Sequence[int], template: str, prompts: Mapping[str, str]
) -> dict[str, str]:
    """`prompts`, which texts without an instruction get in training, and those of instructions.

    If all tasks with `draws` have one prompt, it is that of queries, and if all are symmetric, of
    documents too. Several are stored by the names of their tasks; "query" is then that of the
    run's default instruction, if there is one. Lines of a task that differ have no common prompt.
    """
    by_task: dict[str, set[str]] = {}
    symmetric, start = True, 0
    for task, size in enumerate(data.task_sizes):
        if draws[task]:
            rows = range(start, start + size, -(-size // _LOOKED_AT))
            by_task[data.task_names[task]] = {
                prompts["query"] if one is None else fill_template(template, one)
                for one in (data[row].instruction for row in rows)
            }
            symmetric &= data.settings[task].symmetric
        start += size
    found = set[str]().union(*by_task.values())
    if len(found) == 1:
        (prompt,) = found
        return {**prompts, "query": prompt} | ({"document": prompt} if symmetric else {})
    named = {name: next(iter(some)) for name, some in by_task.items() if len(some) == 1}
    default = {"query": fill_template(template, data.instruction)} if data.instruction else {}
    return named | dict(prompts) | default


def prompt_of(task: str, prompts: Mapping[str, str]) -> str:
    """The stored prompt of a task's queries."""
    return prompts[task if task in prompts and task not in _KINDS else "query"]


def describe(prompts: Mapping[str, str]) -> str:
    """Which prompt is put before what, in a sentence."""
    query, document = (repr(prompts[kind]) if prompts[kind] else "no prompt" for kind in _KINDS)
    named = [name for name in prompts if name not in _KINDS]
    others = (
        f"; by prompt_name: {', '.join(named[:5])}{', ...' * (len(named) > 5)}" if named else ""
    )
    return f"encode_query puts {query} before texts, encode_document {document}{others}"
