"""From text to token ids, by the rules of one checkpoint.

Two choices can lower scores without an error, so both are settled here, once, at load: whether an
end-of-text token closes every text, and that truncation counts the prompt and that token. The rule
is written into the tokenizer itself (its post-processor), so a saved folder carries it to every
other library. Reads `tokenizer.json` and the `tokenizer_config.json` beside it. Chat templates and
padding are not supported.
"""

import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Self, TypeVar

from tokenizers import Tokenizer as FastTokenizer
from tokenizers.processors import Sequence as ProcessorSequence
from tokenizers.processors import TemplateProcessing

from kalm_min.files import Object, read_json, write_json, write_text

_SIDE_FILE = "tokenizer_config.json"
_GENERIC_CLASS = {"tokenizer_class": "PreTrainedTokenizerFast"}

Item = TypeVar("Item")
Result = TypeVar("Result")


class Tokenizer:
    """A checkpoint's tokenizer: `encode` gives lists of ids, `save` writes it back."""

    def __init__(self, fast: FastTokenizer, settings: Object | None = None) -> None:
        """Wrap a `tokenizers.Tokenizer`; `settings` is what `tokenizer_config.json` holds.

        With `add_eos_token` the end-of-text token is appended to every text, unless the file's
        post-processor does so already. Raises ValueError if no such token is known.
        """
        self._fast, self.settings = fast, _GENERIC_CLASS | (settings or {})
        fast.no_padding()
        # A custom class would need remote code; tokenizer.json alone is sufficient.
        self.settings |= _GENERIC_CLASS if self.settings.pop("auto_map", None) else {}
        if not self.settings.pop("add_eos_token", False):
            return
        token = self.settings.get("eos_token")
        token = token["content"] if isinstance(token, dict) else token
        identity = fast.token_to_id(token) if token else None
        if identity is None:
            raise ValueError(f"add_eos_token is set and eos_token {token!r} is not a known token")
        if fast.encode("a").ids[-1] != identity:
            closing = TemplateProcessing(f"$A {token}", special_tokens=[(token, identity)])
            present = [fast.post_processor] if fast.post_processor else []
            fast.post_processor = ProcessorSequence([*present, closing])
            # Libraries that rebuild a class from its rules would lose the new post-processor.
            self.settings |= _GENERIC_CLASS

    @classmethod
    def from_folder(
        cls,
        folder: str | os.PathLike[str],
        end_of_text: bool | None = None,
        rows: int | None = None,
    ) -> Self:
        """Read `tokenizer.json`. Raises ValueError when it is missing or unreadable.

        `end_of_text` replaces the file's `add_eos_token`. Added tokens beyond the `rows` of an
        embedding table are dropped, so that they are read as plain text.
        """
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"{folder}: expected tokenizer.json, found none")
        try:
            fast = FastTokenizer.from_file(str(path))
        except Exception as error:  # the library raises a bare Exception
            raise ValueError(f"{path}: expected a tokenizers file, found: {error}") from error
        side = path.with_name(_SIDE_FILE)
        settings: Object = read_json(side) if side.is_file() else {}
        if end_of_text is not None:
            settings["add_eos_token"] = end_of_text
        if rows is not None and max(fast.get_vocab().values(), default=0) >= rows:
            state = json.loads(fast.to_str())
            dropped = {one["content"] for one in state["added_tokens"] if one["id"] >= rows}
            state["added_tokens"] = [one for one in state["added_tokens"] if one["id"] < rows]
            fast = FastTokenizer.from_str(json.dumps(state))
            # transformers would add again what is listed here; tokenizer.json is sufficient.
            settings.pop("added_tokens_decoder", None)
            for key, value in settings.items():
                if isinstance(value, list):
                    settings[key] = [one for one in value if one not in dropped]
        return cls(fast, settings)

    @property
    def vocab_size(self) -> int:
        """One more than the highest id, added tokens included: ids may have holes."""
        return max(self._fast.get_vocab().values(), default=-1) + 1

    def encode(self, texts: Sequence[str], prompt: str = "", *, max_length: int) -> list[list[int]]:
        """Token ids of `prompt + text`, at most `max_length` of them, special tokens included.

        The prompt is joined as text, as the official code does, so the tokens at the seam are those
        of the joined string. An empty joined text may give no ids. Call `check_texts` first.
        """
        self._fast.enable_truncation(max_length)
        joined = [prompt + text for text in texts]
        return [encoding.ids for encoding in self._fast.encode_batch_fast(joined)]

    def encodes_like(self, other: "Tokenizer") -> bool:
        """Whether both turn texts into the same ids, apart from the length they truncate at."""
        ours, theirs = (json.loads(one._fast.to_str()) for one in (self, other))
        return ours | {"truncation": None} == theirs | {"truncation": None}

    def save(self, folder: str | os.PathLike[str], *, max_length: int) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, which states `max_length`."""
        self._fast.no_truncation()
        write_text(Path(folder) / "tokenizer.json", self._fast.to_str())
        write_json(Path(folder) / _SIDE_FILE, self.settings | {"model_max_length": max_length})


def check_texts(texts: Iterable[object]) -> None:
    """Raise a ValueError naming the first text that is not a string or not valid Unicode."""
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"texts[{index}]: expected a string, found {type(text).__name__}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            found = f"U+{ord(text[error.start]):04X} at character {error.start}"
            raise ValueError(
                f"texts[{index}]: expected valid Unicode, found the lone surrogate {found}; "
                'decode the source with errors="replace"'
            ) from error


def prefetch(
    function: Callable[[Item], Result], items: Iterable[Item], ahead: int = 1
) -> Iterator[Result]:
    """Yield `function` of every item in order; a thread works up to `ahead` items in advance.

    Tokenization releases Python's lock, so texts become ids while the model computes. An error in
    `function` is raised when its item's turn comes.
    """
    with ThreadPoolExecutor(1) as thread:
        waiting: deque[Future[Result]] = deque()
        for item in items:
            waiting.append(thread.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
