"""A worker process seen from its parent: the pipe to it, its log, and how to end it for certain."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

_EVENTS = {
    "ready": (),
    "alive": (),
    "progress": ("texts", "characters"),
    "done": ("task",),
    "failed": ("task", "error", "memory"),
    "unusable": ("error",),
}
"""What a worker says, and what each message must hold."""
_LONGEST_LINE = 1 << 24  # bytes; no message is that long, so it is garbage
_TAIL_LINES = 15


@dataclass(slots=True)
class Child:
    """A running worker. `heard` is when it last gave a sign of life (time.monotonic)."""

    process: subprocess.Popen[bytes]
    log: Path
    heard: float
    log_start: int
    """Where in the log the present task began."""
    _buffer: bytes = field(default=b"")

    @classmethod
    def start(cls, command: Sequence[str], environment: Mapping[str, str], log: Path) -> Self:
        """Start a worker whose stderr goes to the end of `log`."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            file.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(command)}\n".encode())
            file.flush()
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env=environment,
                start_new_session=True,  # its own process group, and no Ctrl-C from the terminal
            )
        return cls(process, log, time.monotonic(), log.stat().st_size)

    def fileno(self) -> int:
        """Of its stdout, for a selector."""
        assert self.process.stdout is not None
        return self.process.stdout.fileno()

    def send(self, message: dict[str, Any]) -> None:
        """Write one line to its stdin."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # then it is dead, and the end of its stdout will say so
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()

    def read(self) -> tuple[list[dict[str, Any]], str]:
        """What has come in: messages, and why no more can come ("" while more can)."""
        chunk = os.read(self.fileno(), 1 << 16)
        *lines, self._buffer = (self._buffer + chunk).split(b"\n")
        messages: list[dict[str, Any]] = []
        for line in lines:
            message = _parse(line)
            if message is None:
                return messages, f"wrote {line[:60]!r} where a message belongs"
            messages.append(message)
            self.heard = time.monotonic()
        if len(self._buffer) > _LONGEST_LINE:
            return messages, "wrote an endless line where a message belongs"
        return messages, "" if chunk else f"died ({self._exit_reason()})"

    def _exit_reason(self) -> str:
        try:
            code = self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "its pipe is closed"
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    def kill(self) -> None:
        """End the process and every child it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            with suppress(BrokenPipeError):  # unsent bytes in a dead process's stdin
                stream.close()

    def mark_log(self) -> None:
        """From here on the log is about the present task."""
        self.log_start = self.log.stat().st_size

    def tail(self) -> str:
        """The last lines of the log since the mark."""
        with self.log.open("rb") as file:
            file.seek(self.log_start)
            lines = file.read().decode("utf-8", "replace").strip().splitlines()
        return "\n".join(lines[-_TAIL_LINES:])


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        message = json.loads(line)
    except ValueError:
        return None
    if not isinstance(message, dict) or message.get("event") not in _EVENTS:
        return None
    return message if message.keys() >= set(_EVENTS[message["event"]]) else None
