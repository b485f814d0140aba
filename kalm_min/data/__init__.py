"""From records on disk to a batch of texts; numpy only, so that data workers start fast."""

from kalm_min.data.batches import TextBatch, collate
from kalm_min.data.dataset import Example, TrainingData
from kalm_min.data.index import JsonlFile
from kalm_min.data.records import TaskSettings

__all__ = ["Example", "JsonlFile", "TaskSettings", "TextBatch", "TrainingData", "collate"]
