"""From text to token ids, by the rules of one checkpoint.

Two choices can lower scores without an error, so both are settled here, once, at load: whether an
end-of-text token closes every text, and that truncation counts the prompt and that token. The rule
is written into the tokenizer itself (its post-processor), so a saved folder carries it to every
other library. Reads `tokenizer.json` and the `tokenizer_config.json` beside it. Chat templates and
padding are not supported.
"""

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Reversible, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import takewhile
from pathlib import Path
from typing import Self, TypeVar, cast

from tokenizers import Tokenizer as FastTokenizer
from tokenizers.processors import Sequence as ProcessorSequence
from tokenizers.processors import TemplateProcessing

from kalm_min.files import AnyPath, Object, write_json, write_text
from kalm_min.schema import describe, is_string, read_object

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
        fast.no_truncation()
        # A custom class would need remote code; tokenizer.json alone is sufficient.
        self.settings |= _GENERIC_CLASS if self.settings.pop("auto_map", None) else {}
        if self.settings.pop("add_eos_token", False):
            self._close_texts()
        # Texts are cut here: the library would keep the length as a state of `fast`, which models
        # with other lengths, in other threads, may share. What closes every text is kept.
        added = fast.encode("a").special_tokens_mask
        self._closing = sum(1 for _ in takewhile(bool, reversed(added)))

    def _close_texts(self) -> None:
        token = self.settings.get("eos_token")
        token = token["content"] if isinstance(token, dict) else token
        identity = self._fast.token_to_id(token) if token else None
        if identity is None:
            raise ValueError(f"add_eos_token is set and eos_token {token!r} is not a known token")
        if self._fast.encode("a").ids[-1] != identity:
            closing = TemplateProcessing(f"$A {token}", special_tokens=[(token, identity)])
            present = [self._fast.post_processor] if self._fast.post_processor else []
            self._fast.post_processor = ProcessorSequence([*present, closing])
            # Libraries that rebuild a class from its rules would lose the new post-processor.
            self.settings |= _GENERIC_CLASS

    @classmethod
    def from_folder(
        cls, folder: AnyPath, end_of_text: bool | None = None, rows: int | None = None
    ) -> Self:
        """Read `tokenizer.json`. Raises ValueError when it is missing or unreadable.

        `end_of_text` replaces the file's `add_eos_token`. Added tokens beyond the `rows` of an
        embedding table are dropped, so that they are read as plain text.
        """
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"{folder}: expected tokenizer.json, found none")
        side, dropped = path.with_name(_SIDE_FILE), list[str]()
        settings = read_object(side, {}, extra=True) if side.is_file() else {}
        if end_of_text is not None:
            settings["add_eos_token"] = end_of_text
        try:
            fast = FastTokenizer.from_file(str(path))
            fast.encode("a")
            words, everything = (max(fast.get_vocab(x).values(), default=0) for x in (False, True))
            # Writing a vocabulary with an id of billions would take hours; the Embedder refuses it.
            if rows is not None and words < rows <= everything:
                state = json.loads(fast.to_str())
                dropped = [one["content"] for one in state["added_tokens"] if one["id"] >= rows]
                state["added_tokens"] = [one for one in state["added_tokens"] if one["id"] < rows]
                fast = FastTokenizer.from_str(json.dumps(state))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library raises a bare Exception, or panics
            without = f" without ids from {rows} on" if dropped else ""
            expected = f"{path}: expected a tokenizers file{without}"
            raise ValueError(f"{expected}, found: {error}") from error
        if dropped:  # transformers would add again what is listed here
            settings.pop("added_tokens_decoder", None)
        for key, value in settings.items():
            if isinstance(value, list):
                settings[key] = [one for one in value if one not in dropped]
        return cls(fast, settings)

    @property
    def vocab_size(self) -> int:
        """One more than the highest id that a text can give: ids may have holes."""
        closing = self._fast.encode("").ids  # may stand in the post-processor alone
        return max([*self._fast.get_vocab().values(), *closing], default=-1) + 1

    def encode(self, texts: Sequence[str], prompt: str = "", *, max_length: int) -> list[list[int]]:
        """Token ids of `prompt + text`, at most `max_length` of them, special tokens included.

        The prompt is joined as text, as the official code does, so the tokens at the seam are those
        of the joined string. An empty joined text may give no ids. Call `check_texts` first.
        """
        encodings = self._fast.encode_batch_fast([prompt + text for text in texts])
        first = max(0, max_length - self._closing)
        return [
            ids if len(ids) <= max_length else ids[:first] + ids[len(ids) - max_length + first :]
            for ids in (encoding.ids for encoding in encodings)
        ]

    def encodes_like(self, other: "Tokenizer") -> bool:
        """Whether both turn texts into the same ids."""
        return self._fast.to_str() == other._fast.to_str()

    def save(self, folder: AnyPath, *, max_length: int) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, which states `max_length`."""
        write_text(Path(folder) / "tokenizer.json", self._fast.to_str())
        write_json(Path(folder) / _SIDE_FILE, self.settings | {"model_max_length": max_length})


def check_texts(texts: Iterable[object], name: str = "texts") -> list[str]:
    """The texts of an ordered collection or an iterator of strings.

    Raises ValueError for anything else, naming its type or the first text that is not valid.
    """
    is_unordered = isinstance(texts, Set) and not isinstance(texts, Reversible)
    is_table = len(getattr(texts, "shape", (0,))) != 1  # a DataFrame, or an array of them
    has_items = hasattr(texts, "__iter__") or hasattr(texts, "__getitem__")
    is_other = isinstance(texts, Mapping | bytes | bytearray | memoryview)
    if is_unordered or is_table or is_other or not has_items:
        expected = f"{name}: expected a string or an ordered collection of strings"
        raise ValueError(f"{expected}, found {type(texts).__name__}")
    # Arrays and columns give their items as Python's own objects by one of these names.
    to_list = getattr(texts, "to_pylist", None) or getattr(texts, "tolist", None)
    items: list[object] = to_list() if to_list else list(texts)
    for index, text in enumerate(items):
        if not is_string(text):
            found = describe(text) if isinstance(text, str) else type(text).__name__
            raise ValueError(f"{name}[{index}]: expected a string, found {found}")
    return cast("list[str]", items)


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
