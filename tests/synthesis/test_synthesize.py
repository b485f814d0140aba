"""synthesize.py against a server on loopback that answers as a function of the request."""

import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kalm_min.data import TrainingData
from kalm_min.evaluation.local import find_datasets
from kalm_min.synthesis.prompts import FOLDER
from kalm_min.synthesize import main

pytest.importorskip("openai")
ROOT = Path(__file__).parent.parent.parent
FAKE = Path(__file__).parent / "fake_server.py"
spec = importlib.util.spec_from_file_location("fake_server", FAKE)
fake = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fake)
FakeServer = fake.FakeServer
KILLS = int(os.environ.get("KILLS", "2"))


@pytest.fixture(autouse=True, scope="module")
def _no_pictures():
    """Without matplotlib, whose pictures cost more than the runs; one test has it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        yield


def flags(server, output, *more, examples=24, concurrency=4):
    """The command's flags; `more` take the place of those that are given here."""
    url = server if isinstance(server, str) else server.url
    given = {"model": "m", "server": url, "output": output, "retries": 1, "timeout": 5}
    given |= {"examples": examples, "concurrency": concurrency, "samples-per-instruction": 2}
    more = [*map(str, more)]
    pairs = [[f"--{name}", str(one)] for name, one in given.items() if f"--{name}" not in more]
    return [*(word for pair in pairs for word in pair), *more]


def contents(folder):
    """What a run is for: everything but its own state."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.relative_to(folder).as_posix().startswith(".")
    }


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def seeds(server):
    """The seeds of the requests, but for the question of what the server supports."""
    return [body["seed"] for body in server.bodies if body["seed"]]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The output of a run without faults, and the requests of it."""
    folder = tmp_path_factory.mktemp("unbroken") / "out"
    with FakeServer(bad_share=0.2) as server:
        assert main(flags(server, folder)) == 0
    return folder, seeds(server), server.bodies


def test_six_types_in_two_languages(unbroken):
    """The output is training data as it is: one file per type and language, instruction per line."""
    data = TrainingData(unbroken[0])
    types = ["long_long", "long_short", "short_long", "short_short", "sts"]
    assert data.task_names == sorted(
        [f"{name}_{code}" for name in types for code in ("en", "zh")]
        + ["bitext_en_zh", "bitext_zh_en"]
    )
    assert all(data[i].instruction for i in range(len(data)))
    assert {one.symmetric for one in data.settings} == {True, False}
    report = (unbroken[0] / "README.md").read_text()
    assert "answer without JSON" in report
    assert "| sts_zh" in report


def test_each_line_has_its_origin(unbroken):
    """The sidecar has the lines of the data in the same order: index, persona, prompt, model."""
    for path in unbroken[0].glob("*.jsonl"):
        origins = lines(unbroken[0] / "README.provenance" / path.name)
        assert len(origins) == len(lines(path))
        assert [one["index"] for one in origins] == sorted(one["index"] for one in origins)
        assert all(one["model"] == "m" and one["personas"] and one["prompt"] for one in origins)


def test_personas_stay_in_the_first_stage(tmp_path):
    """No persona in a request for data of two stages, nor in what training sees, though the model
    repeats its persona wherever it can."""
    personas = [f"PERSONA{number} who is the {number}th tester of leaks" for number in range(50)]
    (tmp_path / "personas.txt").write_text("\n".join(personas))

    def parrot(body):
        answer = json.loads(fake.content_of(body))
        system = [one["content"] for one in body["messages"] if one["role"] == "system"]
        for key in answer if system and random.Random(body["seed"]).random() < 0.5 else ():
            leak = f"As {system[0][21:]} I would say {fake.text_of(random.Random(1), False, 9)}"
            answer[key] = [*answer[key][1:], leak] if key.endswith("s") else leak
        return json.dumps(answer)

    with FakeServer(content=parrot) as server:
        given = flags(
            server, tmp_path / "out", "--personas", tmp_path / "personas.txt", examples=60
        )
        assert main(given) == 0
    asked = [json.dumps(body) for body in server.bodies]
    first = [text for text in asked if "instructions" in text]
    assert first
    assert all("PERSONA" in text for text in first)
    second = [text for text in asked if "A task of text retrieval" in text]
    assert second
    assert not any("PERSONA" in text for text in second)
    texts = contents(tmp_path / "out")
    assert b"persona or prompt in the text" in texts["README.md"]
    assert not any(b"PERSONA" in text for text in texts.values())


def test_concurrency_changes_nothing(unbroken, tmp_path):
    """Equal bytes with one request at a time, and with 16 whose answers come in random order."""
    with FakeServer(bad_share=0.2) as server:
        assert main(flags(server, tmp_path / "one", concurrency=1)) == 0
        assert server.most == 1
    with FakeServer(bad_share=0.2, delay=lambda: random.random() / 50) as server:
        assert main(flags(server, tmp_path / "many", concurrency=16)) == 0
        assert 1 < server.most <= 16
    assert contents(tmp_path / "one") == contents(tmp_path / "many") == contents(unbroken[0])


def test_more_examples_continue_fewer(unbroken, tmp_path):
    """A larger number keeps what is there, and asks only for the rest."""
    with FakeServer(bad_share=0.2) as server:
        assert main(flags(server, tmp_path / "out", examples=10)) == 0
        before = contents(tmp_path / "out")
        assert main(flags(server, tmp_path / "out")) == 0
    assert contents(tmp_path / "out") == contents(unbroken[0]) != before
    assert sorted(seeds(server)) == sorted(unbroken[1])


LAST = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
FAULTS = {
    "too many requests": 429,
    "internal error": 500,
    "unauthorized": 401,
    "not found": 404,
    "bad request": 400,
    "hang": "hang",
    "no HTTP": b"\x1b[31mgarbage {0} %s\r\n\r\n",
    "no completion": LAST + b"content-length: 14\r\n\r\n<html>{}</html",
    "stops in the middle of its JSON": LAST + b'content-length: 900\r\n\r\n{"choices": [{"mess',
    "closes without an answer": b"",
    "endless": "endless",
    "nested": LAST + b"content-length: 100000\r\n\r\n" + b"[" * 100000,
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_end_in_one_sentence_and_lose_nothing(name, unbroken, tmp_path, capfd):
    """From some request on the server has a fault. Later the same command asks only for what is
    missing, and the output is that of an unbroken run."""
    begin = 17
    fault = lambda count, body: FAULTS[name] if count > begin else None  # noqa: E731
    more = ("--timeout", "0.5", "--retries", "0")
    with FakeServer(fault=fault, bad_share=0.2) as server:
        assert main(flags(server, tmp_path / "out", *more, concurrency=2)) == 1
    error = capfd.readouterr().err
    last = [line for line in error.splitlines() if "expected an answer" in line]
    assert len(last) == 1
    assert "the same command continues" in last[0]
    assert "Traceback" not in error
    assert "\x1b" not in error
    assert len(last[0]) < 400
    kept = lines(tmp_path / "out/.synthesis/answers.jsonl")
    assert len(kept) == begin - 1  # the first request asked what the server supports
    with FakeServer(bad_share=0.2) as again:
        assert main(flags(again, tmp_path / "out")) == 0
    assert contents(tmp_path / "out") == contents(unbroken[0])
    assert len(seeds(again)) == len(unbroken[1]) - len(kept)


def test_no_server(tmp_path, capfd, monkeypatch):
    """A refused connection is one sentence, in which there is neither a key nor a password."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\n")
    with FakeServer() as server:
        given = flags(server, tmp_path / "out", "--retries", "0")
        assert main([*given, "--tasks", "sts"]) == 0
    url = server.url.replace("//", "//user:sk-secret@")
    assert main(flags(url, tmp_path / "other", "--retries", "0")) == 1
    error = capfd.readouterr().err
    assert "/v1: expected an answer, found" in error
    assert "sk-secret" not in error
    assert not (tmp_path / "other/README.md").exists()
    for path in (path for path in tmp_path.rglob("*") if path.is_file()):
        assert b"sk-secret" not in path.read_bytes()


def test_a_fault_now_and_then_costs_nothing(unbroken, tmp_path):
    """Failures that a repetition heals leave no trace."""

    def fault(count, body):
        return random.Random(count).choice([500, 429, b"", None]) if count % 4 == 2 else None

    with FakeServer(fault=fault, bad_share=0.2) as server:
        assert main(flags(server, tmp_path / "out", "--retries", "5")) == 0
    assert contents(tmp_path / "out") == contents(unbroken[0])


def test_one_request_that_always_fails_is_counted(tmp_path):
    """What the server answers to no one ends as a lost sample, not as a lost run."""
    with FakeServer() as server:
        assert main(flags(server, tmp_path / "first", concurrency=1)) == 0
    poison = seeds(server)[5]
    fault = lambda count, body: 500 if body["seed"] == poison else None  # noqa: E731
    with FakeServer(fault=fault) as server:
        given = flags(server, tmp_path / "out", "--retries", "0", concurrency=1)
        assert main(given) == 0
        assert main(given) == 0
    assert seeds(server).count(poison) == 1
    assert "HTTP status 500" in (tmp_path / "out/README.md").read_text()


CHOICES = {
    "empty answer": {"message": {"content": ""}},
    "no message": {"message": None},
    "answer cut off at its limit": {"finish_reason": "length"},
    "answer without JSON": {"message": {"content": "Sure! Here is an example."}},
    "answer with other keys or types": {"message": {"content": '{"query": ["a"], "b": 3}'}},
    "deep": {"message": {"content": "[" * 100000 + '{"query":' * 100000}},
    "control characters": {
        "message": {"content": json.dumps({"query": "a \x1b[31m b", "positive": "c d e"})}
    },
    "half a pair": {"message": {"content": '{"query": "a b c \\ud800", "positive": "c d e"}'}},
}


@pytest.mark.parametrize("name", CHOICES)
def test_bad_answers_are_asked_again_and_counted(name, tmp_path, capfd):
    """Three attempts with different seeds, and then the sample is lost, for a reason."""
    fault = lambda count, body: CHOICES[name] if body["seed"] else None  # noqa: E731
    with FakeServer(fault=fault) as server:
        given = flags(server, tmp_path / "out", "--tasks", "bitext", examples=2, concurrency=1)
        assert main(given) == (1 if name == "no message" else 0)
    if name != "no message":
        assert len({*seeds(server)}) == len(seeds(server)) == 6
    if name not in ("no message", "half a pair", "deep"):
        assert name in (tmp_path / "out/README.md").read_text()
    assert "\x1b" not in capfd.readouterr().err
    assert not list((tmp_path / "out").glob("*.jsonl"))


@pytest.mark.parametrize(
    ("refused", "ignored", "mode"),
    [
        ((), (), "json_schema"),
        (("json_schema",), (), "json_object"),
        (("json_schema", "json_object"), (), "text"),
        ((), ("json_schema",), "json_object"),
        ((), ("json_schema", "json_object"), "text"),
    ],
)
def test_structured_output_is_found_out_once(refused, ignored, mode, tmp_path, capfd):
    """What a server refuses, or accepts and ignores, is not used; the choice is printed and kept."""

    def fault(count, body):
        form = body.get("response_format", {}).get("type")
        if form in refused:
            return 400
        if form in ignored:
            return {"message": {"content": "blue, of course"}}
        return (
            {"message": {"content": '{"colour": "red"}'}}
            if not body["seed"] and form != "json_schema"
            else None
        )

    with FakeServer(fault=fault) as server:
        more = ("--retries", "0", "--tasks", "short_long", "sts")
        assert main(flags(server, tmp_path / "out", *more, examples=4)) == 0
        assert f"structured output: {mode}" in capfd.readouterr().err
        asked = [body for body in server.bodies if not body["seed"]]
        assert main(flags(server, tmp_path / "out", *more, examples=5)) == 0
    assert [body for body in server.bodies if not body["seed"]] == asked
    used = {
        body.get("response_format", {"type": "text"})["type"]
        for body in server.bodies
        if body["seed"]
    }
    assert used == {mode}
    assert len(TrainingData(tmp_path / "out")) == 5


def test_passages_and_a_held_out_set(tmp_path):
    """Queries to the user's passages; the held-out ones are a retrieval dataset without any text
    of the training data."""
    rng = random.Random(0)
    rows = [{"_id": f"d{n}", "title": f"T{n}", "text": fake.text_of(rng, False)} for n in range(40)]
    rows.append(rows[3] | {"text": rows[3]["text"].upper() + "!"})  # the same words
    rows[7]["text"] += " {persona} \x7f %s"
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with FakeServer() as server:
        given = flags(server, tmp_path / "out", "--passages", tmp_path / "corpus.jsonl")
        assert main([*given, "--hold-out", "12"]) == 0
    (dataset,) = find_datasets(tmp_path / "out_hold_out")
    assert dataset.type == "Retrieval"
    held = {row["text"].lower() for row in lines(tmp_path / "out_hold_out/corpus.jsonl")}
    queries = {row["text"] for row in lines(tmp_path / "out_hold_out/queries.jsonl")}
    data = TrainingData(tmp_path / "out")
    assert data.task_names == ["passage_en", "passage_zh"]
    assert len(held) == len(queries) == 12
    assert len(data) == 24
    for i in range(len(data)):
        assert data[i].positives[0].lower() not in held
        assert data[i].query not in queries
        assert data[i].positives[0].lower() in {f"{r['title']} {r['text']}".lower() for r in rows}
        assert data[i].instruction


def test_batch_files(unbroken, tmp_path, capfd):
    """Rounds of requests and results through files end in the data of a server."""
    given = flags("", tmp_path / "out", "--batch-files", tmp_path / "batch")
    (tmp_path / "batch").mkdir()
    for number in range(20):
        assert main(given) == 0
        if not (tmp_path / "batch/requests.jsonl").exists():
            break  # every answer was there
        assert "wait for answers" in capfd.readouterr().err
        assert not list((tmp_path / "out").glob("*.jsonl"))
        with (tmp_path / f"batch/results{number}.jsonl").open("w") as file:
            for row in lines(tmp_path / "batch/requests.jsonl"):
                assert row["method"] == "POST"
                assert row["url"] == "/v1/chat/completions"
                content = fake.content_of(row["body"], 0.2)
                choice = {"message": {"content": content}, "finish_reason": "stop"}
                usage = {"prompt_tokens": 100, "completion_tokens": 50}
                response = {"status_code": 200, "body": {"choices": [choice], "usage": usage}}
                if random.Random(number).random() < 0.1:
                    response = {"status_code": 500, "body": None}
                file.write(json.dumps({"custom_id": row["custom_id"], "response": response}) + "\n")
    assert 2 < number < 15
    assert contents(tmp_path / "out") == contents(unbroken[0])


def test_dry_run_asks_nothing(tmp_path, capfd):
    """The prompts of one sample of each type, the number of requests, and an estimate."""
    given = ["--model", "m", "--output", str(tmp_path / "out"), "--dry-run"]
    assert main([*given, "--languages", "en", "de"]) == 0
    output = capfd.readouterr().out
    for name in ("short_long.instructions", "short_long", "sts", "bitext"):
        assert f"--- {name}\n" in output
    assert "requests, some" in output
    assert not (tmp_path / "out").exists()


WRONG = [
    (["--languages", "en", "xx"], "xx"),
    (["--tasks", "short_lon"], "did you mean short_long?"),
    (["--languages", "en"], "two or more for bitext"),
    (["--examples", "0"], "expected 1"),
    (["--hold-out", "5"], "passages"),
    (["--server", "localhost:8000"], "expected a URL"),
    (["--personas", "{folder}/empty.txt"], "at least one persona"),
    (["--personas", "{folder}/bad.jsonl"], "bad.jsonl:2: expected 'persona'"),
    (["--personas", "{folder}/absent.txt"], "absent.txt"),
    (["--passages", "{folder}/bad.jsonl"], "bad.jsonl:1: expected 'text'"),
    (["--tasks", "passage"], "unknown field passage"),
    (["--prompts", "{folder}/prompts"], "the unknown field instrction"),
    (["--prompts", "{folder}/heads"], "sum to 1"),
    (["--prompts", "{folder}/toml"], "sts.txt: expected a prompt file"),
    (["--prompts", "{folder}/share"], "'copied' to be a share from 0 to 1, found 'a'"),
    (["--prompts", "{folder}/words"], "'query' to be the least and the most words, found 3"),
    (["--prompts", "{folder}/flat"], "'slots' to be a table, found 3"),
    (["--prompts", "{folder}/other"], "found 'tone'"),
]


@pytest.mark.parametrize(("more", "sentence"), WRONG)
def test_wrong_requests_are_one_sentence(more, sentence, tmp_path, capfd):
    """Exit code 2, and where, expected, found; nothing is asked."""
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "bad.jsonl").write_text('{"persona": "a"}\n{"persona": 3}\n')
    good = (FOLDER / "prompts/sts.txt").read_text()
    for name, text in (
        ("prompts", f"{good} {{instrction}}"),
        ("heads", good.replace("0.6", "0.7")),
        ("toml", good.replace("---", "[")),
        ("share", good.replace("copied = 1.0", 'copied = "a"')),
        ("words", "[lengths]\nquery = 3\n---\n"),
        ("flat", "slots = 3\n[lengths]\nquery = [1, 9]\n---\n"),
        ("other", f'tone = "a"\n{good}'),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "sts.txt").write_text(text)
    more = [one.format(folder=tmp_path) for one in more]
    given = flags("http://127.0.0.1:9/v1", tmp_path / "o", *more)
    with pytest.raises(SystemExit) as ended:
        sys.exit(main(given))
    assert ended.value.code == 2
    error = capfd.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


def test_other_settings_need_another_folder(unbroken, tmp_path, capfd):
    """What would mix two runs is refused, with what differs."""
    assert main([*flags("http://127.0.0.1:9", unbroken[0]), "--seed", "1"]) == 2
    assert "seed was 0, is 1" in capfd.readouterr().err


def test_own_prompts_and_a_seventh_type(tmp_path):
    """A folder of prompt files replaces and adds types; classes become groups."""
    text = (FOLDER / "prompts/sts.txt").read_text()
    (tmp_path / "faq.txt").write_text(text.replace("Retrieve s", "S"))
    with FakeServer() as server:
        more = ("--tasks", "faq", "classification", "--prompts", tmp_path)
        assert main(flags(server, tmp_path / "out", *more, examples=12)) == 0
    data = TrainingData(tmp_path / "out")
    assert data.task_names == ["classification_en", "classification_zh", "faq_en", "faq_zh"]
    assert data[0].group.startswith(data[0].instruction)
    assert data[len(data) - 1].instruction == "Semantically similar text"


def test_a_torn_last_line_is_asked_again(unbroken, tmp_path):
    """A line of the answers that a kill has torn is dropped."""
    shutil.copytree(unbroken[0], tmp_path / "out")
    path = tmp_path / "out/.synthesis/answers.jsonl"
    path.write_bytes(path.read_bytes()[:-30])
    with FakeServer(bad_share=0.2) as server:
        assert main(flags(server, tmp_path / "out")) == 0
    assert server.count == 1
    assert contents(tmp_path / "out") == contents(unbroken[0])


def program(server, output, *more, examples):
    command = [
        sys.executable,
        ROOT / "synthesize.py",
        *flags(server, output, *more, examples=examples),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def test_ctrl_c_keeps_what_is_there(tmp_path):
    """One sentence, exit code 130, the samples decided so far in their files."""
    with FakeServer(bad_share=0.2, delay=lambda: 0.05) as server:
        process = program(server, tmp_path / "out", examples=200)
        while server.count < 60:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=60)[1]
        assert process.returncode == 130, error
        assert error.rstrip().endswith("the same command continues")
        assert "Traceback" not in error
        assert len(TrainingData(tmp_path / "out")) >= 1
        assert "broken off" in (tmp_path / "out/README.md").read_text()


@pytest.mark.slow
def test_killed_at_random_points(tmp_path):
    """After each kill -9 the same command goes on: no answer is asked for twice, no line is torn,
    and in the end the output is that of an unbroken run."""
    rng = random.Random(KILLS)
    with FakeServer(bad_share=0.2) as server:
        assert main(flags(server, tmp_path / "unbroken", examples=120)) == 0
        total = len(seeds(server))
    with FakeServer(bad_share=0.2, delay=lambda: rng.random() / 100) as server:
        for _ in range(KILLS):
            process = program(server, tmp_path / "out", examples=120)
            until = server.count + rng.randrange(1, max(2, total // KILLS))
            while server.count < until and process.poll() is None:
                time.sleep(0.002)
            process.kill()
            process.communicate()
        kept = lines_kept(tmp_path / "out/.synthesis/answers.jsonl")
        assert main(flags(server, tmp_path / "out", examples=120)) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "unbroken")
    asked = seeds(server)
    assert len(asked) - total <= 4 * KILLS  # at most those under way at a kill
    assert kept <= total
    keys = [one["key"] for one in lines(tmp_path / "out/.synthesis/answers.jsonl")]
    assert len(keys) == len({*keys}) == total


def lines_kept(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0
