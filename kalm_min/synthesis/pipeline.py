"""The run: samples are decided in the order of their indices, with answers on disk or asked for.

The file of raw answers, which only grows, is the whole state. After a kill the same command decides
everything again with the answers that are there, and asks for the others; so the output depends on
the answers alone, and not on the order in which they came.
"""

import asyncio
import json
import os
import re
import shutil
import signal
import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import IO, TextIO

from kalm_min import files
from kalm_min.console import Progress
from kalm_min.files import Object
from kalm_min.options import SynthesisConfig
from kalm_min.schema import Field, is_text, is_whole, read_object, read_rows
from kalm_min.synthesis import filters
from kalm_min.synthesis.prompts import Plan, Prompt, Sample
from kalm_min.synthesis.server import Server, read_completion, response_format

BIN = 10  # words, in the histograms of lengths
_ATTEMPTS = 3  # the first, and two with other seeds
_PROVENANCE = "README.provenance"  # a folder; readers of training data skip the name
_AHEAD = 8  # samples under way per request, so that one slow answer does not stop the others
# What another run in the same folder may change; of the paths, the content is compared.
_FREE = "output server examples concurrency timeout retries batch_files dry_run".split()
_PATHS = "personas prompts passages".split()


def _is_object(value: object) -> bool:
    return isinstance(value, dict)


def _is_key(value: object) -> bool:
    return re.fullmatch("[0-9a-f]{16}", str(value)) is not None


_SETTINGS = {"settings": Field("an object", _is_object, required=True)}
_SETTINGS |= {"structured": Field("a text", is_text, required=True)}
_SETTINGS |= {"decided": Field("a number", is_whole, required=True)}
_RESULT = {"custom_id": Field("a custom_id of requests.jsonl", _is_key, required=True)}
_RESULT |= {"response": Field("an object", _is_object)}


class NoAnswerError(Exception):
    """An answer is not on disk, and there is no server to ask."""


class Answers:
    """Raw answers in a JSONL file that only grows, found by the key of their request.

    A failed request waits for an answer to another one, which shows that the server works; then the
    failure is an answer, too.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._synced, self._waiting = path, time.monotonic(), list[bytes]()
        self._file, self._reader = path.open("ab", buffering=0), path.open("rb")
        self._starts, start = dict[int, int](), 0
        for number, line in enumerate(self._reader, 1):
            if not line.endswith(b"\n"):  # torn by a kill
                os.truncate(path, start)
            elif not (match := re.match(rb'\{"key": "([0-9a-f]{16})"', line)):
                expected = "expected an answer, found none; delete the line"
                raise ValueError(f"{path}:{number}: {expected}")
            else:
                self._starts.setdefault(int(match[1], 16), start)
                start += len(line)

    def find(self, key: str) -> Object | None:
        """An answer that was there when the file was opened."""
        if (start := self._starts.get(int(key, 16))) is None:
            return None
        self._reader.seek(start)
        return files.parse_object(self._reader.readline(), self._path)

    def add(self, key: str, answer: Object) -> None:
        """Append an answer: a kill does not lose it, a power cut loses at most a second of them."""
        self._waiting.append(json.dumps({"key": key, **answer}).encode() + b"\n")
        if "error" not in answer:
            self.flush()

    def flush(self) -> None:
        """Append the failures that wait."""
        data = b"".join(self._waiting)
        self._waiting.clear()
        if self._file.write(data) < len(data):
            raise OSError(f"{self._path}: no space left for an answer")
        if time.monotonic() > self._synced + 1:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def close(self) -> None:
        """Sync and close the file, without the failures that wait."""
        os.fsync(self._file.fileno())
        self._file.close()
        self._reader.close()


@dataclass
class _Found:
    """What became of a sample: a line of training data, or None after the last attempt."""

    line: Object | None = None
    attempts: int = 0
    request: str = ""  # the key of the last one
    tokens: int = 0
    reasons: list[str] = field(default_factory=list)  # of the rejected attempts


_Instructions = tuple[list[str], _Found]


class Synthesis:
    """A run in the folder of its output, which the caller has locked.

    `counts` has the number of samples by file and outcome: asked, accepted, or the reason of each
    rejected answer; `lengths` those by file, key and length in bins. Raises ValueError if the
    folder holds a run with other settings.
    """

    def __init__(self, config: SynthesisConfig, plan: Plan, stream: TextIO) -> None:
        self.config, self.plan, self._server = config, plan, None
        self._state, self._work = config.output / ".synthesis", config.output / ".synthesis/work"
        shutil.rmtree(self._work, ignore_errors=True)
        self._work.mkdir(parents=True)
        plain = {key: one for key, one in asdict(config).items() if key not in _FREE + _PATHS}
        current: Object = json.loads(json.dumps(plain | plan.sources))
        self._settings = {"settings": current, "structured": config.structured, "decided": 0}
        if (path := self._state / "settings.json").exists():
            self._settings = read_object(path, _SETTINGS)
            if changed := files.differences(self._settings["settings"], current):
                expected = f"{config.output}: expected the settings of the run in this folder"
                raise ValueError(f"{expected}, found others ({changed}); give another --output")
        self._answers, self._seen = Answers(self._state / "answers.jsonl"), filters.Seen()
        self._files, self._first = dict[str, IO[str]](), dict[str, asyncio.Task[_Instructions]]()
        self.counts, self.lengths = Counter[tuple[str, str]](), Counter[tuple[str, str, int]]()
        self.missing = self.decided = self.accepted = self.tokens = 0
        self._start = time.monotonic()
        self._progress = Progress(plan.total, "samples", stream, title="synthesize")

    def run(self) -> None:
        """Decide every sample. Raises ConnectionError if the server does not answer."""
        if folder := self.config.batch_files:
            self._read_results(folder)
        else:
            self._server = Server(self.config)
        with self._progress:
            try:
                asyncio.run(self._run())
            except asyncio.CancelledError as error:
                raise KeyboardInterrupt(*error.args) from error

    async def _run(self) -> None:
        if run := asyncio.current_task():
            for number in (signal.SIGINT, signal.SIGTERM):
                asyncio.get_running_loop().add_signal_handler(number, run.cancel, number)
        ahead = _AHEAD * self.config.concurrency
        window = deque[tuple[Sample, asyncio.Task[_Found]]]()
        try:
            if self._settings["structured"] == "auto":
                mode = await self._server.find_mode() if self._server else "json_schema"
                self._settings["structured"] = mode
                self._progress.line(f"structured output: {mode}")
            files.write_json(self._state / "settings.json", self._settings)
            for sample in map(self.plan.sample, range(self.plan.total)):
                window.append((sample, asyncio.create_task(self._find(sample, _Found()))))
                if len(window) >= ahead:
                    await self._settle(*window.popleft())
            while window:
                await self._settle(*window.popleft())
            self._answers.flush()
        finally:
            for task in (tasks := [*self._first.values(), *(task for _, task in window)]):
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if self._server:
                await self._server.close()

    async def _settle(self, sample: Sample, task: asyncio.Task[_Found]) -> None:
        """Compare a sample with all before it, and write it."""
        try:
            found, keys = await task, list[int]()
            while line := found.line:
                keys = self._seen.keys("query", line["query"])
                if sample.passage is None:  # a passage may have several queries
                    keys += self._seen.keys("positive", line["pos"][0])
                if not self._seen.holds(keys):
                    break
                found.reasons.append("near duplicate")
                await self._find(sample, found)
        except NoAnswerError:
            self.missing += 1
            return
        self.counts.update((sample.name, reason) for reason in ("asked", *found.reasons))
        self.tokens += found.tokens
        self.decided += 1
        if line:
            self.accepted += 1
            self.counts[sample.name, "accepted"] += 1
            self._seen.add(keys)
            for key, text in (("query", line["query"]), ("positive", line["pos"][0])):
                self.lengths[sample.name, key, len(filters.words(text)) // BIN] += 1
            self._write_sample(sample, found, line)
        if sample.number < self.config.hold_out:  # also without a query, it is a document
            row = {"_id": str(sample.passage), "text": sample.values["passage"]}
            self._write("hold_out/corpus.jsonl", row)
        speed = self.decided / (time.monotonic() - self._start)
        share = self.accepted / self.decided
        self._progress.update(1, f"{speed:.1f}/s, {share:.0%} accepted, {self.tokens:,} tokens")

    async def _find(self, sample: Sample, found: _Found) -> _Found:
        """Ask for a sample until an attempt is kept, after those of `found`."""
        found.line, instruction = None, sample.prompt.instruction
        if sample.first:
            instructions, first = await self._instructions(sample)
            if not found.attempts and sample.row % self.plan.repeats == 0:  # it is counted once
                found.reasons, found.tokens = [*first.reasons], first.tokens
            if not instructions:
                found.reasons.append("no instruction")
                return found
            instruction = instructions[sample.row % len(instructions)]
        values = sample.values | {"instruction": instruction}
        while not found.line and found.attempts < _ATTEMPTS:
            answer = await self._ask(sample.prompt, values, str(sample.number), found)
            found.line, reason = self._read(sample, instruction, answer)
            found.reasons += [reason] if reason else []
        return found

    async def _instructions(self, sample: Sample) -> _Instructions:
        """The instructions of a first-stage answer, which many samples share."""
        if sample.first not in self._first:
            self._first[sample.first] = asyncio.create_task(self._invent(sample))
            if len(self._first) > _AHEAD * self.config.concurrency + len(self.plan.pairs):
                del self._first[next(iter(self._first))]  # no sample under way needs it
        return await self._first[sample.first]

    async def _invent(self, sample: Sample) -> _Instructions:
        prompt, found = self.plan.prompts[f"{sample.prompt.name}.instructions"], _Found()
        values = sample.values | {"number": str(self.config.instructions_per_persona)}
        while found.attempts < _ATTEMPTS:
            answer = await self._ask(prompt, values, sample.first, found)
            texts, reason = filters.parse(answer, prompt.lengths)
            judged = {
                text: self._judge(sample, prompt, "instructions", [text])
                for text in texts.get("instructions", ())
            }
            if good := [text.rstrip(" .") for text, why in judged.items() if not why]:
                return good, found
            reason = reason or next(iter(judged.values()), "empty text")
            found.reasons.append(f"instructions: {reason}")
        return [], found

    async def _ask(
        self, prompt: Prompt, values: Mapping[str, str], label: str, found: _Found
    ) -> Object:
        """The answer to a request, from the disk if it is there."""
        body = self.plan.body(prompt, values, label, found.attempts)
        body |= response_format(self._settings["structured"], prompt.schema())
        found.attempts += 1
        found.request = files.digest(json.dumps(body, sort_keys=True))[:16]
        if (answer := self._answers.find(found.request)) is None:
            if self._server is None:
                request = {"method": "POST", "url": "/v1/chat/completions", "body": body}
                self._write("requests.jsonl", {"custom_id": found.request, **request})
                raise NoAnswerError
            answer = await self._server.ask(body)
            self._answers.add(found.request, answer)
        found.tokens += sum(answer.get("tokens", ()))
        return answer

    def _read(self, sample: Sample, instruction: str, answer: Object) -> tuple[Object | None, str]:
        """A line of training data made of an answer, or the reason why there is none."""
        texts, reason = filters.parse(answer, sample.prompt.lengths)
        for key, some in texts.items():
            reason = reason or self._judge(sample, sample.prompt, key, some)
        if reason:
            return None, reason
        query, positives = texts["query"][0], texts.get("positive") or [sample.values["passage"]]
        negatives = [*dict.fromkeys(texts.get("negatives", ()))]
        line: Object = {"query": query, "pos": positives, "neg": negatives}
        line["instruction"] = instruction
        if "label" in texts:
            line["group"] = f"{instruction}: {texts['label'][0].lower()}"
        reason = filters.compare(query, positives[0], negatives, sample.prompt.copied)
        return (None, reason) if reason else (line, "")

    def _judge(self, sample: Sample, prompt: Prompt, key: str, texts: list[str]) -> str:
        """Why a text of a key is rejected: by itself, or for what it repeats."""
        codes = {"query": sample.languages[0], "label": "en", "instructions": "en"}
        scripts = self.plan.known[codes.get(key, sample.languages[1])][1:]
        reasons = (filters.judge(text, prompt.lengths[key], scripts) for text in texts)
        personas = (filters.runs(self.plan.personas[number]) for number in sample.personas)
        secrets = chain(prompt.secrets, *personas)
        return next(filter(None, reasons), "") or filters.find_leak(texts, secrets)

    def _write_sample(self, sample: Sample, found: _Found, line: Object) -> None:
        held_out = sample.number < self.config.hold_out
        name = "hold_out" if held_out else sample.name
        origin = {"index": sample.number, "seed": self.config.seed, "attempt": found.attempts - 1}
        origin |= {"personas": sample.personas, "passage": sample.passage}
        origin |= {"prompt": self.plan.sources[sample.prompt.name][:12]}
        origin |= {"model": self.config.model, "request": found.request}
        self._write(f"{_PROVENANCE}/{name}.jsonl", origin)
        if held_out:
            query, document = str(sample.number), str(sample.passage)
            self._write("hold_out/queries.jsonl", {"_id": query, "text": line["query"]})
            self._write("hold_out/qrels/test.tsv", f"{query}\t{document}\t1\n")
        else:
            self._write(f"{name}.jsonl", line)
            if sample.prompt.symmetric and f"{name}.toml" not in self._files:
                self._write(f"{name}.toml", "symmetric = true\n")

    def _write(self, name: str, row: Object | str) -> None:
        """Append to a file that `publish` puts in its place."""
        if name not in self._files:
            path = self._work / name
            path.parent.mkdir(parents=True, exist_ok=True)
            self._files[name] = path.open("w", encoding="utf-8", newline="")
            if name.endswith(".tsv"):
                self._files[name].write("query-id\tcorpus-id\tscore\n")
        text = row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) + "\n"
        self._files[name].write(text)

    def publish(self) -> bool:
        """Put what was decided in its place, each file complete, and return whether this was done.

        Not if an earlier run got further, nor if batch files lack answers: then those are requested.
        """
        output, batch = self.config.output, self.config.batch_files
        self._answers.close()
        for file in self._files.values():
            with file:
                file.flush()
                os.fsync(file.fileno())
        if batch and self.missing:
            found, wanted = self._work / "requests.jsonl", batch / "requests.jsonl"
            with found.open("rb") as source, files.atomic_write(wanted) as target:
                shutil.copyfileobj(source, target)
            return False
        if not self.decided or self.decided < min(self._settings["decided"], self.plan.total):
            return False
        for name in self._files:  # data before their settings, which would be refused without it
            held_out = Path(f"{output.resolve()}_hold_out") / name.removeprefix("hold_out/")
            path = held_out if name.startswith("hold_out/") else output / name
            path.parent.mkdir(parents=True, exist_ok=True)
            (self._work / name).replace(path)
        self._settings["decided"] = self.decided
        files.write_json(self._state / "settings.json", self._settings)
        if batch and self.decided == self.plan.total:
            (batch / "requests.jsonl").unlink(missing_ok=True)
        return True

    def _read_results(self, folder: Path) -> None:
        """Take the answers of a batch server from every other JSONL file of the folder."""
        problems: list[str] = []
        for path in sorted({*folder.glob("*.jsonl")} - {folder / "requests.jsonl"}):
            for _, row in read_rows(path, _RESULT, problems):
                key, response = row["custom_id"], row.get("response") or {}
                is_good = response.get("status_code") == 200  # others are requested again
                if is_good and self._answers.find(key) is None:
                    self._answers.add(key, read_completion(response.get("body")))
        if problems:
            raise ValueError(problems[0])
        self._answers.flush()
        self._answers.close()
        self._answers = Answers(self._state / "answers.jsonl")
