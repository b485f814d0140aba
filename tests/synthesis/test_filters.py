"""Filters: what is rejected, and why."""

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kalm_min.options import SynthesisConfig
from kalm_min.synthesis.filters import Seen, compare, find_leak, judge, parse, runs, words
from kalm_min.synthesis.prompts import Plan

LATIN = ["LATIN"]
GOOD = "Beekeepers treat their colonies against mites once the honey has been taken off in summer."


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (GOOD, ""),
        ("", "empty text"),
        ("... !", "empty text"),
        ("two words", "text too short"),
        (GOOD * 9, "text too long"),
        (f"{GOOD} \x1b[31m", "control characters"),
        (f"{GOOD} \u202e", "control characters"),
        ("养蜂人在夏天取蜜之后为蜂群除螨", "wrong language"),
        ("Пчеловоды обрабатывают свои семьи против клещей", "wrong language"),
        ("I'm sorry, but this is not something to write about.", "refusal"),
        ("As an AI language model, bees are dear to me.", "refusal"),
        ("the bees are the bees are the bees are the bees are", "repeated text"),
        ("what a loooooooooooooooong day for the bees", "repeated text"),
        ("He is a beekeeper in the Alps who sells honey.", "persona or prompt in the text"),
    ],
)
def test_texts_are_judged(text, reason):
    """Form, length, script, refusals, leaks of the persona."""
    secrets = runs("A beekeeper in the Alps who sells honey")
    assert (judge(text, (3, 40), LATIN) or find_leak([GOOD, text], secrets)) == reason


@pytest.mark.parametrize(
    ("text", "scripts"),
    [
        ("夏天取蜜之后要为蜂群除螨。", ["CJK"]),
        ("ミツバチの群れをダニから守る", ["HIRAGANA", "KATAKANA", "CJK"]),
        ("꿀벌을 진드기로부터 보호하는 방법", ["HANGUL"]),
        ("मधुमक्खियों को घुन से कैसे बचाएं", ["DEVANAGARI"]),
        ("كيف نحمي النحل من العث", ["ARABIC"]),
    ],
)
def test_other_scripts(text, scripts):
    """Texts in scripts with and without spaces are counted in words and accepted."""
    assert judge(text, (3, 40), scripts) == ""
    assert judge(text, (3, 40), LATIN) == "wrong language"


def test_texts_are_compared():
    """Copies of the query, and a positive that is a negative, whatever the punctuation."""
    query = "how do beekeepers treat colonies against mites in summer"
    assert compare(query, GOOD, ["something else"], 0.5) == ""
    assert compare(query, f"{query.title()}? They wait for the honey.", [], 0.5)
    assert compare(query, GOOD, [GOOD.upper()], 0.5) == "equal texts in a sample"
    assert compare(query, f"{query}!", [], 1.0) == "equal texts in a sample"
    assert compare("养蜂人如何在夏天除螨", "养蜂人如何在夏天除螨?取蜜之后再治。", [], 0.5)


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ('{"query": "a", "negatives": ["b"]}', True),
        ('```json\n{"query": "a", "negatives": ["b", "c"]}\n```', True),
        ('<think>{"query": 1}</think> Here: {"query": "a", "negatives": []} Enjoy!', True),
        ('{"query": "a"}', False),
        ('{"query": "a", "negatives": "b"}', False),
        ('{"query": "a", "negatives": [["b"]]}', False),
        ('["a"]', False),
        ('{"query": "a", "negati', False),
        ("[" * 100_000 + "{" * 100_000, False),
        ("", False),
    ],
)
def test_answers_are_parsed(content, texts):
    """One JSON object in whatever surrounds it, with the keys and types of the prompt."""
    found, reason = parse({"content": content, "finish": "stop"}, ["query", "negatives"])
    assert bool(found) == texts == (not reason)


@settings(max_examples=50)
@given(st.text(), st.text())
def test_no_text_breaks_a_filter(content, text):
    """Whatever a model writes ends as texts or as a reason."""
    found, reason = parse({"content": content}, ["query"])
    assert bool(found) != bool(reason)
    assert isinstance(judge(text, (1, 50), LATIN) + find_leak([text], runs("a b c")), str)
    assert isinstance(compare(text, content, [text], 0.5), str)
    assert all(word == word.lower() for word in words(text)) or text


def test_near_duplicates():
    """A changed word, case, order or punctuation does not hide a duplicate; other texts pass."""
    rng, seen = random.Random(0), Seen()
    vocabulary = [f"word{n}" for n in range(2000)]
    texts = [rng.sample(vocabulary, 30) for _ in range(3000)]
    for text in texts:
        keys = seen.keys("query", " ".join(text))
        assert not seen.holds(keys)
        seen.add(keys)
    for text in texts[:200]:
        text[rng.randrange(30)] = "changed"
        rng.shuffle(text)
        assert seen.holds(seen.keys("query", ", ".join(text).upper()))
        assert not seen.holds(seen.keys("positive", " ".join(text)))
    assert not seen.holds(seen.keys("query", "what is the capital of France"))
    seen.add(seen.keys("query", "what is the capital of France"))
    assert not seen.holds(seen.keys("query", "what is the capital of Spain"))
    assert seen.holds(seen.keys("query", "What is the capital of France?"))


def test_phrases_of_slots_and_prompts_are_leaks():
    """A weak model answers with the words that describe the answer."""
    wanted = {"model": "m", "output": Path("o"), "dry_run": True, "tasks": ("sts", "short_long")}
    prompts = Plan(SynthesisConfig(**wanted)).prompts
    for name, text in (
        ("short_long", "extremely long-tail: one very particular case, I think"),
        (
            "short_long",
            "Every text can be understood alone. The positive does not repeat the words.",
        ),
        ("sts", "4.5 (nearly the same meaning)"),
    ):
        assert find_leak([GOOD, text], prompts[name].secrets)
    assert not find_leak([GOOD], prompts["sts"].secrets)
