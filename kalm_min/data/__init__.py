"""From records on disk to a batch of texts; numpy only, so that data workers start fast."""

from kalm_min.data.batches import TextBatch, collate
from kalm_min.data.dataset import Example, TaskSettings, TrainingData
from kalm_min.data.index import JsonlFile

__all__ = ["Example", "JsonlFile", "TaskSettings", "TextBatch", "TrainingData", "collate"]
