"""Recall: bindings of keys to values are shown, and asked for later. What a memory of fixed size is tested with."""

from tidegate.tasks.recall.data import IGNORE, one_token_pairs, segment_recall
from tidegate.tasks.recall.task import PairModel, score

__all__ = ["IGNORE", "PairModel", "one_token_pairs", "score", "segment_recall"]
