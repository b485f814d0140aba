"""A chat completion server on loopback whose answers depend on the request alone.

    with FakeServer() as server: ... server.url, server.bodies

`fault(number, body)` returns None for a good answer, or what happens to request `number` (from 1):
an int (an HTTP status), bytes (a raw response, then the connection is closed), "hang" (silence),
"endless" (a body without end), or a dict that replaces keys of the answer's choice.
Run as a program, it writes its URL; the argument is the share of bad answers.
"""

import asyncio
import json
import random
import re
import sys
import threading

SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "an", "or")]
HANZI = [chr(code) for code in range(0x4E00, 0x5200)]
BAD = (
    "I'm sorry, I cannot help with that.",
    "As an AI language model I have no garden to speak of, but many people do have one.",
    "",
    '{"query": "torn',
    "the same words the same words the same words the same words the same words",
)


def text_of(rng, chinese, count=30):
    if chinese:
        return "".join(rng.choices(HANZI, k=count))
    return " ".join("".join(rng.choices(SYLLABLES, k=3)) for _ in range(count))


def keys_of(body):
    """The keys of the answer: of the schema, or those that the prompt names."""
    form = body.get("response_format", {})
    if "json_schema" in form:
        return form["json_schema"]["schema"]["properties"]
    text = body["messages"][-1]["content"]
    return re.findall(r'^"(\w+)":|key "(\w+)"', text, re.MULTILINE) and {
        a or b: {} for a, b in re.findall(r'^"(\w+)":|key "(\w+)"', text, re.MULTILINE)
    }


def content_of(body, bad_share=0.0):
    """The text of an answer: a function of the request."""
    rng = random.Random(json.dumps(body, sort_keys=True))
    keys, prompt = keys_of(body), body["messages"][-1]["content"]
    if "colour" in keys:
        return json.dumps({"colour": "ultramarine"})
    if rng.random() < bad_share:
        bad = rng.choice(BAD)
        return bad if rng.random() < 0.5 else json.dumps(dict.fromkeys(keys, bad))
    answer = {}
    for key in keys:
        chinese = "in Chinese" in prompt and key != "label"
        if key == "positive" and "translation into" in prompt:
            chinese = "into Chinese" in prompt
        count = 3 if key == "label" else 30
        texts = [text_of(rng, chinese, count) for _ in range(3)]
        answer[key] = texts if key.endswith("s") else texts[0]
    return json.dumps(answer, ensure_ascii=False)


class FakeServer:
    def __init__(self, fault=None, bad_share=0.0, content=content_of, delay=None, keep=True):
        self.fault, self.bad_share, self.content, self.delay = fault, bad_share, content, delay
        self.bodies, self.count, self.keep = [], 0, keep
        self.port, self.busy, self.most = 0, 0, 0

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}/v1"

    async def serve(self, ready):
        self.loop = asyncio.get_running_loop()
        self.end = asyncio.Event()
        self.tasks = set()
        server = await asyncio.start_server(self.connection, "127.0.0.1", self.port, limit=1 << 22)
        self.port = server.sockets[0].getsockname()[1]
        ready()
        await self.end.wait()
        server.close()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    async def connection(self, reader, writer):
        self.tasks.add(asyncio.current_task())
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(re.search(rb"content-length: (\d+)", head, re.IGNORECASE)[1])
                body = json.loads(await reader.readexactly(length))
                self.busy += 1
                self.most = max(self.most, self.busy)
                try:
                    if not await self.answer(body, writer):
                        return
                finally:
                    self.busy -= 1
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()
            self.tasks.discard(asyncio.current_task())

    async def answer(self, body, writer):
        """Answer a request; whether the connection stays open."""
        self.count += 1
        if self.keep:
            self.bodies.append(body)
        if self.delay:
            await asyncio.sleep(self.delay())
        fault = self.fault(self.count, body) if self.fault else None
        choice = {"index": 0, "finish_reason": "stop"}
        if isinstance(fault, dict):
            choice |= fault
        if "message" not in choice:
            content = self.content(body, self.bad_share) if self.bad_share else self.content(body)
            choice["message"] = {"role": "assistant", "content": content}
        usage = {"prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 150}
        answer = {"id": "x", "object": "chat.completion", "created": 0, "model": "fake"}
        data = json.dumps(answer | {"choices": [choice], "usage": usage}).encode()
        status = fault if isinstance(fault, int) else 200
        if status != 200:
            data = b'{"error": {"message": "\\u001b[31mred\\u001b[0m {persona} %s"}}'
        if fault == "hang":
            await asyncio.sleep(1000)
        head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\n".encode()
        if fault == "endless":
            writer.write(head + b"transfer-encoding: chunked\r\n\r\n")
            while True:
                writer.write(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")
                await writer.drain()
        if isinstance(fault, bytes):
            writer.write(fault)
            await writer.drain()
            return False
        writer.write(head + f"content-length: {len(data)}\r\n\r\n".encode() + data)
        await writer.drain()
        return True

    def __enter__(self):
        ready = threading.Event()
        self.thread = threading.Thread(target=lambda: asyncio.run(self.serve(ready.set)))
        self.thread.start()
        ready.wait()
        return self

    def __exit__(self, *_):
        self.loop.call_soon_threadsafe(self.end.set)
        self.thread.join()


if __name__ == "__main__":
    server = FakeServer(keep=False, bad_share=float(sys.argv[1]))
    asyncio.run(server.serve(lambda: sys.stdout.write(f"{server.url}\n") and sys.stdout.flush()))
