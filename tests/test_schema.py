"""Declared fields and the readers that check them; data/test_dataset.py covers training lines."""

import json

import pytest

from kalm_min.schema import (
    Field,
    is_flag,
    is_label,
    is_number,
    is_string,
    is_text,
    problem_with,
    read_object,
    read_rows,
    read_settings,
)

FIELDS = {
    "text": Field("a string", is_string, required=True),
    "label": Field("a text or a whole number", is_label, required=True),
    "summaries": Field("a list of at least two texts", is_text, items=2),
    "binary": Field("0 or 1", lambda value: is_number(value) and value in (0, 1)),
    "symmetric": Field("true or false", is_flag),
}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({}, None),
        ({"text": "", "label": 0, "summaries": ["a", "b"], "binary": 1.0}, None),
        ({"summaries": None, "binary": None}, None),
        ({"text": None}, "expected 'text' to be a string, found nothing"),
        ({"label": ""}, "expected 'label' to be a text or a whole number, found an empty string"),
        ({"summaries": ["a"]}, "to be a list of at least two texts, found 1 items"),
        ({"summaries": ["a", 5]}, "to be a list of at least two texts, found 5 as item 2"),
        ({"summaries": "a"}, "to be a list of at least two texts, found 'a'"),
        ({"binary": 2}, "expected 'binary' to be 0 or 1, found 2"),
        ({"binary": 10**400}, "expected 'binary' to be 0 or 1, found a number that is too large"),
        ({"symmetric": 1}, "expected 'symmetric' to be true or false, found 1"),
        ({"text": "x" * 99 + "\ud83d"}, "found a string with half a surrogate pair"),
        ({"text": ["x"]}, "expected 'text' to be a string, found a list"),
        ({"label": True}, "found true"),
        ({"symmetric": "no " * 99}, "found 'no no no no ... no no no no '"),
    ],
)
def test_the_first_violation(change, problem):
    """What was expected, what was found; a long value is shortened."""
    found = problem_with({"text": "t", "label": "l"} | change, FIELDS)
    assert found == problem or problem in found


def test_other_keys():
    """Refused unless they are allowed."""
    record = {"text": "t", "label": "l", "id": 1}
    assert problem_with(record, FIELDS).startswith("expected the keys text, label, ")
    assert problem_with(record, FIELDS, extra=True) is None


def test_rows_of_a_file(tmp_path):
    """Good rows come with their line numbers; the others are all listed with theirs."""
    path = tmp_path / "test.jsonl"
    good = {"text": "t", "label": 1, "more": 2}
    lines = [json.dumps(good), "", "{oops", json.dumps({"text": "t"}), json.dumps(good)]
    path.write_text("\n".join(lines))
    problems = []
    assert list(read_rows(path, FIELDS, problems)) == [(1, good), (5, good)]
    assert [problem.partition(": ")[0] for problem in problems] == [f"{path}:3", f"{path}:4"]
    assert problems[1].endswith("expected 'label' to be a text or a whole number, found nothing")


def test_settings(tmp_path):
    """A dictionary; the first thing wrong is reported with the file."""
    path = tmp_path / "task.toml"
    path.write_text("text = 'x'\nlabel = 1\nsummaries = ['a', 'b']\n")
    assert read_settings(path, FIELDS) == {"text": "x", "label": 1, "summaries": ["a", "b"]}
    path.write_text("symetric = true")
    with pytest.raises(ValueError, match=r"task\.toml: .* 'symetric' \(did you mean symmetric\?\)"):
        read_settings(path, FIELDS)


def test_objects(tmp_path):
    """A JSON file is an object that fits its fields; a null counts as absent, so that a default holds."""
    path = tmp_path / "side.json"
    path.write_text('{"text": "x", "label": 1, "symmetric": null, "other": null}')
    assert read_object(path, FIELDS, extra=True) == {"text": "x", "label": 1, "other": None}
    for content, problem in {
        "[]": "expected a JSON object, found an empty list",
        "null": "expected a JSON object, found nothing",
        '{"text": "x", "label": 1, "other": 2}': "expected the keys text, label, summaries, binary",
        '{"text": "x", "label": true}': "expected 'label' to be a text or a whole number, found true",
        '{"text": "x", "label": 1' + "0" * 4000 + "}": "found a number that is too large",
        '{"text": "x", "label": 1, "label": 2}': "expected JSON, found the key 'label' twice in one",
        '{"text": "x", "label": 1, "binary": NaN}': "to be 0 or 1, found NaN",
    }.items():
        path.write_text(content)
        with pytest.raises(ValueError, match="expected") as error:
            read_object(path, FIELDS)
        assert str(error.value).startswith(f"{path}: ")
        assert problem in str(error.value)
        assert "\n" not in str(error.value)
