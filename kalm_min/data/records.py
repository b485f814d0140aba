"""What a line of training data (LINE) and the settings of a task (TaskSettings) may hold."""

from dataclasses import dataclass
from typing import Annotated, get_type_hints

from kalm_min.files import Object
from kalm_min.schema import (
    Field,
    describe,
    is_flag,
    is_label,
    is_number,
    is_string,
    is_text,
    is_whole,
    problem_with,
)

_FLAG = Field("true or false", is_flag)
LINE = {  # the keys of a line of training data, in the usual order
    "query": Field("a non-empty string", is_text, required=True),
    "pos": Field("a list of at least one non-empty string", is_text, items=0),
    "neg": Field("a list of non-empty strings", is_text, items=0),
    "task": Field("a non-empty string", is_text),
    "instruction": Field("a string", is_string),
    "group": Field("a non-empty string or a whole number", is_label),
    "pos_scores": Field("a list of numbers", is_number, items=0),
    "neg_scores": Field("a list of numbers", is_number, items=0),
    "relevance": Field("a number", is_number),
}


@dataclass(frozen=True, slots=True)
class TaskSettings:
    """What `<task>.toml` beside the data may set."""

    # For lines without an instruction. "" means none, even if the run has a default.
    instruction: Annotated[str | None, LINE["instruction"]] = None
    # Queries and documents are of one kind (similarity, duplicates): both get the instruction.
    symmetric: Annotated[bool, _FLAG] = False
    # False: the candidates of a query are only the documents of its line.
    in_batch_negatives: Annotated[bool, _FLAG] = True
    # Positives are other texts of the line's group, negatives texts of other groups;
    # what the lines hold as "pos" and "neg" is not trained on, and "pos" may be absent.
    label_based: Annotated[bool, _FLAG] = False
    # How often an epoch takes each example; 0.5 is half of them, a new half in each epoch.
    weight: Annotated[float, Field("a number from 0 to 1000", lambda v: is_number(v, 0, 1000))] = (
        1.0
    )
    # The maximum number of examples per epoch, a new subset in each epoch.
    max_examples: Annotated[
        int | None,
        Field("a whole number, 1 or more", lambda v: is_whole(v, least=1)),
    ] = None


SETTINGS: dict[str, Field] = {
    name: hint.__metadata__[0]
    for name, hint in get_type_hints(TaskSettings, include_extras=True).items()
}


def problem_with_line(record: Object) -> str | None:
    """What is wrong with a line of training data, or None.

    A line with a group may have no positives: a label-based task draws them from the group.
    """
    if problem := problem_with(record, LINE):
        return problem
    if not record.get("pos") and record.get("group") is None:
        return f"expected 'pos' to be {LINE['pos'].expected}, found {describe(record.get('pos'))}"
    for key in ("pos", "neg"):
        scores, texts = record.get(f"{key}_scores"), record.get(key) or ()
        if scores is not None and len(scores) != len(texts):
            wanted = f"one number per {key!r}, {len(texts)}"
            return f"expected '{key}_scores' to hold {wanted}, found {len(scores)}"
    return None
