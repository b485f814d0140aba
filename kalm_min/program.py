"""A command as a process: how it begins, how Ctrl-C ends it, and output that cannot end it.

It imports nothing of the package before Ctrl-C is in hand. A command is a module with a function
`main(argv)`, which reads the flags before anything heavy is imported and returns the exit code.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from importlib import import_module

TYPE_CHECKING = False  # see __init__.py
if TYPE_CHECKING:
    from types import FrameType
    from typing import NoReturn


class _Output(io.FileIO):
    """A descriptor that takes everything: a closed pipe (`| head`), a full disk, no terminal."""

    def write(self, data: memoryview, /) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        try:
            written = super().write(data)
        except OSError:
            written = None
        return data.nbytes if written is None else written  # None, too, if a pipe may not wait


def lasting(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    """The same text stream, but writing to it raises no error, whatever the text and its end."""
    raw = _Output(stream.fileno(), "wb", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw),  # pyright: ignore[reportArgumentType]
        encoding=stream.encoding,
        errors="backslashreplace",  # a character that the terminal lacks is written as its code
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def start(command: str) -> NoReturn:
    """Be the process of `kalm_min.<command>`, with the words of the command line after the name."""
    signal.signal(signal.SIGINT, end_at_once)
    for name in ("stdout", "stderr"):
        if isinstance(stream := getattr(sys, name), io.TextIOWrapper):  # None without a console
            setattr(sys, name, lasting(stream))
    code = import_module(f"kalm_min.{command}").main(sys.argv[1:])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the work is done
    sys.stdout.flush()
    sys.stderr.flush()
    # Caches of torch keep a sharded model's group of processes alive, and one of its threads that
    # needs the interpreter during shutdown would abort the process, whose work is done.
    if "WORLD_SIZE" in os.environ:
        os._exit(code)
    sys.exit(code)


def end_at_once(_: int, __: FrameType | None) -> NoReturn:
    """End by Ctrl-C while modules are imported: nothing has begun, and imports may swallow it."""
    os.write(2, b"\ninterrupted\n")
    os._exit(130)


def begin() -> None:
    """From here on Ctrl-C or SIGTERM raises KeyboardInterrupt: there is work to keep or to remove."""
    if signal.getsignal(signal.SIGINT) is end_at_once:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _interrupt)


def _interrupt(number: int, _: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt(number)
