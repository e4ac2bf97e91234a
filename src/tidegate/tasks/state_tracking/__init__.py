"""State tracking: every token changes a hidden state; what is it now? What the transitions of a layer can express."""

from tidegate.tasks.state_tracking.arithmetic import modular_arithmetic, modular_arithmetic_answer
from tidegate.tasks.state_tracking.groups import GROUPS, group_elements, group_words, multiplication_table
from tidegate.tasks.state_tracking.parity import parity, parity_answer

__all__ = [
    "GROUPS",
    "group_elements",
    "group_words",
    "modular_arithmetic",
    "modular_arithmetic_answer",
    "multiplication_table",
    "parity",
    "parity_answer",
]
