"""Records on disk -> one training batch of texts. Numpy only, so that data workers start fast."""

from kalm_min.data.jsonl import JsonlFile

__all__ = ["JsonlFile"]
