"""The prompts that a model stores when it is finished: those with which it was trained."""

from collections.abc import Mapping, Sequence

from kalm_min.data import TrainingData
from kalm_min.embedder import Embedder
from kalm_min.settings import fill_template

_KINDS = ("query", "document")
_LOOKED_AT = 100  # lines of a task, evenly spread, that tell its instruction


def trained_prompts(data: TrainingData, draws: Sequence[int], embedder: Embedder) -> dict[str, str]:
    """The prompts to store beside those of `embedder`, which texts without an instruction get.

    If all tasks with `draws` have one prompt, it is that of queries, and if all are symmetric, of
    documents too. Several are stored by the names of their tasks; "query" is then that of the
    run's default instruction, if there is one. Lines of a task that differ have no common prompt.
    """
    by_task: dict[str, set[str]] = {}
    symmetric, start, template = True, 0, embedder.instruction_template
    for task, size in enumerate(data.task_sizes):
        if draws[task]:
            rows = range(start, start + size, -(-size // _LOOKED_AT))
            by_task[data.task_names[task]] = {
                embedder.prompts["query"] if one is None else fill_template(template, one)
                for one in (data[row].instruction for row in rows)
            }
            symmetric &= data.settings[task].symmetric
        start += size
    found = set[str]().union(*by_task.values())
    if len(found) == 1:
        return dict.fromkeys(_KINDS if symmetric else _KINDS[:1], *found)
    default = {"query": fill_template(template, data.instruction)} if data.instruction else {}
    common = {name: next(iter(one)) for name, one in by_task.items() if len(one) == 1}
    return default | {name: one for name, one in common.items() if name not in _KINDS}


def prompt_of(task: str, prompts: Mapping[str, str]) -> str:
    """The stored prompt of a task's queries."""
    return prompts[task if task in prompts and task not in _KINDS else "query"]


def describe(prompts: Mapping[str, str]) -> str:
    """Which prompt is put before what, in a sentence."""
    query, document = (repr(prompts[kind]) if prompts[kind] else "no prompt" for kind in _KINDS)
    named = [repr(name) for name in prompts if name not in _KINDS]
    others = (
        f"; by prompt_name: {', '.join(named[:5])}{', ...' * (len(named) > 5)}" if named else ""
    )
    return f"encode_query puts {query} before texts, encode_document {document}{others}"
