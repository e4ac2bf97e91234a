"""ListOps: nested lists of digits under minimum, maximum, median and sum; what does the expression give?"""

from tidegate.tasks.list_ops.data import CLOSE, OPERATORS, PAD, VOCAB_SIZE, list_ops
from tidegate.tasks.score import majority

__all__ = ["CLOSE", "OPERATORS", "PAD", "VOCAB_SIZE", "list_ops", "majority"]
