"""Using a trained model: sampling and generation."""

from tidegate.infer.generate import Generation
from tidegate.infer.sampling import row_seeds, sample_next

__all__ = ["Generation", "row_seeds", "sample_next"]
