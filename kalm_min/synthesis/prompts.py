"""Prompt files, personas and passages, and what is drawn from them by (seed, index) alone.

A prompt file is a head in TOML (see Prompt), a line `---`, and the text for the model. `{name}` in
the text is a field: a slot of the head, or a name below; any other brace is plain text. A type of
task with a second file `<type>.instructions.txt` has two stages: that file asks a persona for
training instructions, and `<type>.txt` asks for an example of one of them, without the persona.
"""

import random
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kalm_min import files
from kalm_min.data.index import JsonlFile
from kalm_min.files import Object
from kalm_min.options import SynthesisConfig
from kalm_min.schema import (
    Field,
    is_flag,
    is_number,
    is_string,
    is_text,
    is_whole,
    problem_with,
    read_rows,
)
from kalm_min.synthesis.filters import RUN, runs, words

FOLDER = Path(__file__).parent
_OFFERED, _POOL = 4, 200  # personas offered with a passage: the nearest of so many drawn
_SHOWN = 6000  # characters of a passage, or of another text, that the model sees
_FIELD = re.compile(r"\{(\w+)\}")
_PERSONA = {"persona": Field("a non-empty string", is_text, required=True)}
_PASSAGE = {"text": Field("a non-empty string", is_text, required=True)}
_PASSAGE |= {"title": Field("a string", is_string)}
_LENGTH = Field("the least and the most words", partial(is_whole, least=1), items=2, required=True)
_SHARE = Field("a probability", partial(is_number, least=0, most=1), required=True)
_TABLE = Field("a table", lambda value: isinstance(value, dict))
_HEAD = {
    "lengths": replace(_TABLE, required=True),
    "slots": _TABLE,
    "system": Field("a string", is_string),
    "instruction": Field("a string", is_string),
    "symmetric": Field("true or false", is_flag),
    "copied": Field("a share from 0 to 1", partial(is_number, least=0, most=1)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A prompt file."""

    name: str
    text: str
    lengths: Mapping[str, Sequence[int]]  # the answer's keys: least and most words; plural: a list
    slots: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # words: probability
    system: str = ""  # the system message
    instruction: str = ""  # for training, where no first stage writes one
    symmetric: bool = False  # a setting of the task: documents get the instruction, too
    copied: float = 0.5  # share of the query's runs of five words that the positive may repeat
    secrets: frozenset[str] = frozenset()  # runs of words of the text and the slots

    def schema(self) -> Object:
        """The JSON schema of an answer; without lengths, which would cut texts in the middle."""
        one: Object = {"type": "string"}
        some = {"type": "array", "items": one, "minItems": 1, "maxItems": 10}
        properties = {key: some if key.endswith("s") else one for key in self.lengths}
        keys = {"required": [*properties], "additionalProperties": False}
        return {"type": "object", "properties": properties} | keys


class Sample(NamedTuple):
    """What is drawn for an index, except for the slots of its prompt."""

    number: int  # its index
    row: int  # its index among those of its type and language
    name: str  # of its file
    prompt: Prompt
    values: dict[str, str]  # of the prompt's fields
    languages: tuple[str, str]  # codes: of the query, of the documents
    personas: list[int]  # the number of its persona, or of those offered with the passage
    first: str  # label of the first-stage answer that holds its instruction; "" without one
    passage: int | None


class Plan:
    """The samples of a run, by index.

    Raises ValueError for prompts, personas, passages or languages that cannot be used.
    """

    def __init__(self, config: SynthesisConfig) -> None:
        self.config, self.total = config, config.examples + config.hold_out
        self.repeats = config.instructions_per_persona * config.samples_per_instruction
        self.known: dict[str, list[str]] = files.read_toml(FOLDER / "languages.toml")
        self.languages = _chosen("--languages", config.languages, self.known)
        folders = [FOLDER / "prompts", *filter(None, [config.prompts])]
        paths = {path.stem: path for folder in folders for path in sorted(folder.glob("*.txt"))}
        types = [name for name in paths if not name.endswith(".instructions")]
        tasks = _chosen("--tasks", ["passage"] if config.passages else config.tasks, types)
        self.prompts: dict[str, Prompt] = {}
        for task in tasks:
            own, keys = ("persona",), ["query", "positive"]
            if config.passages:
                own, keys = ("passage", "personas"), ["query"]
            elif (first := f"{task}.instructions") in paths:
                fields = {"persona", "number"}
                self.prompts[first] = _read_prompt(paths[first], fields, ["instructions"])
                own = ("instruction",)
            self.prompts[task] = _read_prompt(paths[task], {"language", "target", *own}, keys)
        if len(self.languages) < 2 and any("{target}" in p.text for p in self.prompts.values()):
            raise ValueError("--languages: expected two or more for bitext in --tasks, found one")
        self.pairs = [(task, code) for task in tasks for code in self.languages]
        self.personas = _read_personas(config.personas or FOLDER / "personas.txt")
        self.sources = {name: files.hash_files([("", paths[name])]) for name in self.prompts}
        self.sources["personas"] = files.digest(*self.personas)
        if config.passages:
            self._file = JsonlFile(config.passages)
            self._order = self._distinct()
            self.sources["passages"] = files.hash_files([("", config.passages)])

    def passage(self, number: int) -> str:
        """The title and the text of a passage, as training sees them."""
        row = self._file[number]
        if problem := problem_with(row, _PASSAGE, extra=True):
            raise ValueError(f"{self._file.location(number)}: {problem}")
        return f"{row.get('title') or ''} {row['text']}".strip()

    def _distinct(self) -> list[int]:
        """The numbers of passages of different words, in a random order; held-out ones first."""
        texts = map(self.passage, range(len(self._file)))
        hashes = np.fromiter((files.text_hash(" ".join(words(text))) for text in texts), np.int64)
        first = np.sort(np.unique(hashes, return_index=True)[1])
        if len(first) <= self.config.hold_out:
            expected = f"expected more than {self.config.hold_out} different passages"
            raise ValueError(f"{self.config.passages}: {expected}, found {len(first)}")
        return np.random.default_rng(self.config.seed).permutation(first).tolist()

    def sample(self, index: int) -> Sample:
        """The sample of an index."""
        config, first, passage = self.config, "", None
        row, pair = divmod(index, len(self.pairs))
        task, code = self.pairs[pair]
        if config.passages:
            held, rest = config.hold_out, len(self._order) - config.hold_out
            passage = self._order[index if index < held else held + (index - held) % rest]
            text = self.passage(passage)
            personas = self._offered(text, random.Random(f"{config.seed}/offered/{index}"))
            offered = "\n".join(f"- {self.personas[number]}" for number in personas)
            values = {"passage": text, "personas": offered}
        else:
            number = row
            if f"{task}.instructions" in self.prompts:
                number //= self.repeats
                first = f"{task}/{code}/{number}"
            epoch, number = divmod(number, len(self.personas))
            personas = [int(_order(len(self.personas), config.seed, pair, epoch)[number])]
            values = {"persona": self.personas[personas[0]]}
        prompt = self.prompts[task]
        target = self.languages[(self.languages.index(code) + 1) % len(self.languages)]
        values |= {"language": self.known[code][0], "target": self.known[target][0]}
        languages = (code, target if "{target}" in prompt.text else code)
        name = "_".join([task, *dict.fromkeys(languages)])
        return Sample(index, row, name, prompt, values, languages, personas, first, passage)

    def body(self, prompt: Prompt, values: Mapping[str, str], label: str, attempt: int) -> Object:
        """A request. Slots depend on seed and label, the request's own seed also on the attempt."""
        seed = f"{self.config.seed}/{label}"
        known, rng = {key: text[:_SHOWN] for key, text in values.items()}, random.Random(seed)
        for key, one in prompt.slots.items():
            known[key] = rng.choices([*one], [*one.values()])[0]
        messages = [  # fields are filled in one pass, so values are plain text
            {"role": role, "content": _FIELD.sub(lambda match: known[match[1]], text)}
            for role, text in (("system", prompt.system), ("user", prompt.text))
            if text
        ]
        return {
            "model": self.config.model,
            "messages": messages,
            "temperature": self.config.temperature,
            "max_tokens": self.config.max_tokens,
            "seed": files.text_hash(f"{seed}/{attempt}") & (2**31 - 1),
        }

    def _offered(self, text: str, rng: random.Random) -> list[int]:
        """The personas that share the most words with a passage, of some drawn at random."""
        drawn = rng.sample(range(len(self.personas)), min(_POOL, len(self.personas)))
        found = {word for word in words(text) if len(word) > 3 or not word.isascii()}
        drawn.sort(key=lambda number: -len(found & {*words(self.personas[number])}))
        return drawn[:_OFFERED]


@lru_cache(maxsize=32)
def _order(size: int, *seeds: int) -> np.ndarray:
    """An epoch's order of the personas."""
    return np.random.default_rng(seeds).permutation(size).astype(np.int32)


def _chosen(flag: str, names: Iterable[str], known: Iterable[str]) -> list[str]:
    """The names without repetitions. Raises ValueError for one that is not known."""
    known = sorted(known)
    for name in names:
        if name not in known:
            near = files.did_you_mean(name, known) or f"; there are {', '.join(known)}"
            raise ValueError(f"{flag}: expected known names, found {name!r}{near}")
    return [*dict.fromkeys(names)]


def _check(table: Object, fields: Mapping[str, Field]) -> None:
    if problem := problem_with(table, fields):
        raise ValueError(problem)


def _read_prompt(path: Path, fields: set[str], keys: Iterable[str]) -> Prompt:
    """Read a prompt file with these keys. Raises ValueError if it cannot be used."""
    head, line, text = files.read_text(path).replace("\r\n", "\n").partition("\n---\n")
    try:
        table = tomllib.loads(head)
        _check(table, _HEAD)
        _check(table["lengths"], dict.fromkeys(table["lengths"], _LENGTH))
        slots = table.get("slots", {})
        _check(slots, dict.fromkeys(slots, _TABLE))
        for shares in slots.values():
            _check(shares, dict.fromkeys(shares, _SHARE))
        secrets = {run for run in runs(text, 8) if len(run.split()) == 8}
        for phrase in (phrase for one in slots.values() for phrase in one):
            secrets |= {run for run in runs(phrase) if len(run.split()) == RUN}
        prompt = Prompt(name=path.stem, text=text.strip(), secrets=frozenset(secrets), **table)
        if not line or not all(0 < least <= most for least, most in prompt.lengths.values()):
            raise ValueError("no line --- after a table of lengths")
        for name, shares in prompt.slots.items():
            if abs(sum(shares.values()) - 1) > 1e-6:
                raise ValueError(f"probabilities of {name} that do not sum to 1")
        used = {*_FIELD.findall(prompt.system + text)}
        if unknown := used - fields - {*prompt.slots}:
            raise ValueError(f"the unknown field {min(unknown)} in the text")
        if missing := {*keys} - {*prompt.lengths}:
            raise ValueError(f"no lengths of {min(missing)}")
    except ValueError as error:
        expected = "expected a prompt file as docs/synthesis.md describes it"
        raise ValueError(f"{path}: {expected}: {error}") from error
    return prompt


def _read_personas(path: Path) -> list[str]:
    """The personas of a JSONL file (Persona Hub's layout) or of a text file, one per line."""
    problems: list[str] = []
    if ".jsonl" in path.suffixes:
        personas = [row["persona"] for _, row in read_rows(path, _PERSONA, problems)]
    else:
        personas = files.read_lines(path)
    if not (personas := [one.strip() for one in personas if one.strip()]) or problems:
        found = f"{path}: expected at least one persona, found none"
        raise ValueError(problems[0] if problems else found)
    return personas
