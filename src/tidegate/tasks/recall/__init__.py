"""Recall: bindings of keys to values are shown, and asked for later. What a memory of fixed size is tested with."""

from tidegate.tasks.recall.data import one_token_pairs, segment_recall
from tidegate.tasks.recall.induction import induction, induction_copies
from tidegate.tasks.recall.queries import associative_recall, mqar, pairs_in_noise
from tidegate.tasks.recall.task import PairModel
from tidegate.tasks.score import score
from tidegate.tasks.targets import IGNORE

__all__ = [
    "IGNORE",
    "PairModel",
    "associative_recall",
    "induction",
    "induction_copies",
    "mqar",
    "one_token_pairs",
    "pairs_in_noise",
    "score",
    "segment_recall",
]
