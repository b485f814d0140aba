"""A stand-in for the hub: dataset repositories in their real layout with tiny rows, and a server."""

import gzip
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

WORDS = "the cat sat on a mat one dog ran far to see birds".split()


def text(number):
    """Different for different numbers."""
    return " ".join(WORDS[number // 13**i % 13] for i in range(3)) + f" {WORDS[number % 11]}"


def pairs(count, **more):
    return [
        {"sentence1": text(i), "sentence2": text(7 * i + 5)} | {k: f(i) for k, f in more.items()}
        for i in range(count)
    ]


CORPUS = [{"_id": f"d{i}", "title": "", "text": text(i)} for i in range(20)]
QUERIES = [{"_id": f"q{i}", "text": text(3 * i + 1)} for i in range(4)]
QRELS = [{"query-id": f"q{i}", "corpus-id": f"d{3 * i}", "score": 1} for i in range(4)]
RANKED = [{"query-id": f"q{i}", "corpus-ids": [f"d{j}" for j in range(4 * i)]} for i in (1, 2, 3)]
RANKED += [{"query-id": "q0", "corpus-ids": ["d0", "d5", "d7"]}]
LABELLED = [
    {"text": f"{text(i)} {'card' if i % 2 else 'rate'}", "label": i % 2, "label_text": "x"}
    for i in range(24)
]
SUMMARIES = [
    {
        "text": text(i),
        "human_summaries": [text(i + 1), text(i + 2)],
        "machine_summaries": [text(17 * i + 29 * j) for j in range(4)],  # no ties between cosines
        "relevance": [1.0, 2.5, 3.0, 4.0 + i],
        "id": f"s{i}",
    }
    for i in range(3)
]

# Task -> files of its repository. The suffix of a name gives the format of the rows.
REPOSITORIES = {
    "STS12": {
        "test.jsonl.gz": pairs(12, score=lambda i: i % 5 + 0.5),
        "train.jsonl.gz": pairs(2, score=float),
    },
    "STS17": {
        f"test/{lang}.jsonl.gz": pairs(12, score=lambda i: i % 4, lang=lambda i, lang=lang: lang)
        for lang in ("en-en", "ko-ko")
    },
    "SciFact": {
        "corpus.jsonl": CORPUS,
        "queries.jsonl": QUERIES,
        "qrels/test.jsonl": QRELS,
        "qrels/train.jsonl": QRELS[:1],
    },
    "AskUbuntuDupQuestions": {
        "corpus/test-00000-of-00001.parquet": CORPUS,
        "queries/test-00000-of-00001.parquet": QUERIES,
        "default/test-00000-of-00001.parquet": QRELS,
        "top_ranked/test-00000-of-00001.parquet": RANKED,
    },
    "Banking77Classification": {"train.jsonl": LABELLED, "test.jsonl": LABELLED},
    "TwentyNewsgroupsClustering": {
        "test.jsonl.gz": [
            {"sentences": [text(i) for i in range(30)], "labels": [i % 3 for i in range(30)]}
        ]
    },
    "SprintDuplicateQuestions": {
        "test.json.gz": [
            {
                "sent1": [text(i) for i in range(20)],
                "sent2": [text(2 * i) for i in range(20)],
                "labels": [i % 2 for i in range(20)],
            }
        ]
    },
    "SummEval": {"test.jsonl.gz": SUMMARIES},
    "Tatoeba": {"deu-eng/test-00000-of-00001.parquet": pairs(9, lang=lambda i: "deu-eng")},
}
CONFIGS = {
    "STS17": {
        "default": {"test": "test/*"},
        "en-en": {"test": "test/en-en.jsonl.gz"},
        "ko-ko": {"test": "test/ko-ko.jsonl.gz"},
    },
    "SciFact": {
        "default": {"train": "qrels/train.jsonl", "test": "qrels/test.jsonl"},
        "corpus": {"corpus": "corpus.jsonl"},
        "queries": {"queries": "queries.jsonl"},
    },
    "AskUbuntuDupQuestions": {
        name: {"test": f"{name}/test-*"} for name in ("default", "corpus", "queries", "top_ranked")
    },
    "Tatoeba": {"deu-eng": {"test": "deu-eng/test-*"}},
}


def write_repository(folder, task):
    """Write the files of a task's repository, including README.md with its configurations."""
    lines = ["---", "language: en"]
    if task in CONFIGS:
        lines.append("configs:")
    for name, splits in CONFIGS.get(task, {}).items():
        lines += [f"- config_name: {name}", "  data_files:"]
        lines += [
            line
            for split, path in splits.items()
            for line in (f"  - split: {split}", f"    path: {path}")
        ]
    contents = {"README.md": "\n".join([*lines, "---", "A card."]).encode()}
    for name, rows in REPOSITORIES[task].items():
        contents[name] = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
        if name.endswith(".gz"):
            contents[name] = gzip.compress(contents[name], mtime=0)
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".parquet"):
            from datasets import Dataset

            Dataset.from_list(REPOSITORIES[task][name]).to_parquet(path)
        else:
            path.write_bytes(content)


def listed(folder, revision, path):
    """The hub API's answer about a repository."""
    names = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    if "/tree/" in path:
        tree = [
            {"type": "file", "path": name, "size": p.stat().st_size, "oid": digest(p)}
            for name, p in names.items()
        ]
        return json.dumps(tree).encode()
    siblings = [{"rfilename": name} for name in names]
    return json.dumps({"id": "a/name", "sha": revision, "siblings": siblings}).encode()


def digest(path):
    return hashlib.sha1(path.read_bytes()).hexdigest()


@contextmanager
def serve(repositories):
    """Serve a hub of {"owner/name": (revision, folder)}; yield address and requested paths."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_HEAD(self):
            self.answer(with_body=False)

        def do_GET(self):
            self.answer(with_body=True)

        def answer(self, *, with_body):
            asked.append(self.path)
            status, content, headers = 404, b'{"error": "Repository not found"}', {}
            headers["X-Error-Code"] = "RepoNotFound"
            # The client lists a repository by its tree; older ones ask for /revision/.
            listing = re.fullmatch(
                r"/api/datasets/([^/]+/[^/]+)/(?:tree|revision)/(\w+)", self.path_only()
            )
            file = re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/(\w+)/(.+)", self.path_only())
            if (found := listing or file) and repositories.get(found[1], ("",))[0] == found[2]:
                revision, folder = repositories[found[1]]
                if listing:
                    status, content, headers = 200, listed(folder, revision, self.path), {}
                elif (folder / found[3]).is_file():
                    status, content = 200, (folder / found[3]).read_bytes()
                    headers = {"ETag": f'"{digest(folder / found[3])}"', "X-Repo-Commit": revision}
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(content))}).items():
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                self.wfile.write(content)

        def path_only(self):
            return self.path.partition("?")[0].replace("%2F", "/")

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
