"""The model behind an OpenAI-compatible server.

A raw answer is {"content", "finish", "tokens": [of the prompt, of the answer]}, or {"error"} for a
request that a server does not answer though it answers others. The server's key is read from
OPENAI_API_KEY, and is neither written nor shown.
"""

import asyncio
import errno
import json
import os
from typing import TYPE_CHECKING, cast
from urllib.parse import urlsplit

from kalm_min.files import Object
from kalm_min.options import SynthesisConfig

if TYPE_CHECKING:
    from openai import AsyncAPIResponse

MODES = ("json_schema", "json_object", "text")  # how to ask for JSON, the strictest first
_FAILURES = 4  # requests in a row without an answer that end a run
_LIMIT = 1 << 22  # bytes of an answer
_CONNECTIONS = 8  # per client: the transport looks at all its connections for each request
_PROBE: Object = {"type": "object", "properties": {"colour": {"enum": ["ultramarine"]}}}
_PROBE |= {"required": ["colour"], "additionalProperties": False}


def response_format(mode: str, schema: Object) -> Object:
    """The part of a request that asks for JSON."""
    if mode == "text":
        return {}
    named = {"json_schema": {"name": "answer", "strict": True, "schema": schema}}
    return {"response_format": {"type": mode} | (named if mode == "json_schema" else {})}


def read_completion(data: bytes | bytearray | Object | None) -> Object:
    """The raw answer in a chat completion; an error if it is none."""
    try:
        found = json.loads(data) if isinstance(data, bytes | bytearray) else data or {}
        choice, usage = found["choices"][0], found.get("usage") or {}
        content, finish = choice["message"].get("content"), choice.get("finish_reason")
        tokens = [int(usage.get(f"{kind}_tokens") or 0) for kind in ("prompt", "completion")]
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return {"error": "answer that is no chat completion"}
    return {"content": str(content or ""), "finish": str(finish), "tokens": tokens}


class Server:
    """Asks a server. Raises ConnectionError with one sentence when no answer is to be had."""

    def __init__(self, config: SynthesisConfig) -> None:
        try:
            import openai
        except ModuleNotFoundError as error:
            wanted = 'asking a server needs openai: pip install "kalm-min[synthesis]"'
            raise ValueError(wanted) from error
        self._openai, self._config, self._failures = openai, config, 0
        # Local servers need no key. One with a line end would be shown in an error.
        key = "".join(os.environ.get("OPENAI_API_KEY", "").split()) or "none"
        options = {"timeout": config.timeout, "max_retries": config.retries}
        self._clients = [
            openai.AsyncOpenAI(api_key=key, base_url=config.server, **options)
            for _ in range(0, config.concurrency, _CONNECTIONS)
        ]
        self._slots = asyncio.Semaphore(config.concurrency)

    async def ask(self, body: Object) -> Object:
        """The raw answer to a request."""
        async with self._slots:
            answer = await self._ask(body)
        self._failures = self._failures + 1 if "error" in answer else 0
        if self._failures >= _FAILURES:
            raise self._end(f"{_FAILURES} failures in a row, at last {answer['error']}")
        return answer

    async def find_mode(self) -> str:
        """The strictest of MODES that the server has and enforces."""
        message = {"role": "user", "content": 'Name a colour, as a JSON object: {"colour": "..."}'}
        body = {"model": self._config.model, "messages": [message], "seed": 0, "max_tokens": 50}
        for mode in MODES:
            answer = await self._ask(body | response_format(mode, _PROBE))
            if "error" in answer and (mode == "text" or answer["error"].endswith(("429", "503"))):
                raise self._end(answer["error"])  # it serves no one, at least not now
            try:
                found = json.loads(answer.get("content", ""))
            except (ValueError, RecursionError):
                continue
            if found == {"colour": "ultramarine"} or (mode != MODES[0] and isinstance(found, dict)):
                return mode
        return MODES[-1]

    async def _ask(self, body: Object) -> Object:
        self._clients.append(client := self._clients.pop(0))  # in turn
        # As chat.completions.with_streaming_response.create, without its walk over the body.
        headers, data = {"X-Stainless-Raw-Response": "stream"}, bytearray()
        post = client.post(
            "/chat/completions", cast_to=object, body=body, options={"headers": headers}
        )
        try:
            response = cast("AsyncAPIResponse[object]", await post)
        except self._openai.APIStatusError as error:
            if error.status_code in (401, 403, 404):
                raise self._end(f"HTTP {error.status_code} ({error.message:.200})") from error
            return {"error": f"HTTP status {error.status_code}"}
        except self._openai.APIConnectionError as error:
            raise self._end(str(error.__cause__ or error)) from error
        try:  # the body may be torn, slow or endless
            async with asyncio.timeout(self._config.timeout):
                async for chunk in response.iter_bytes():
                    data += chunk
                    if len(data) > _LIMIT:
                        return {"error": "endless answer"}
        except Exception as error:  # of the transport below openai, whichever that is
            return {"error": f"torn answer ({type(error).__name__})"}
        finally:
            await response.close()
        return read_completion(data)

    async def close(self) -> None:
        """Close the connections."""
        for client in self._clients:
            await client.close()

    def _end(self, found: str) -> ConnectionError:
        where = urlsplit(self._config.server)
        name = where._replace(netloc=where.netloc.rpartition("@")[2]).geturl()  # no password
        found = f"expected an answer, found {' '.join(found.split())}"
        return ConnectionError(errno.ECONNABORTED, found, name)
