"""Using a trained model: sampling, generation, and single tokens as one compiled call."""

from tidegate.infer.generate import Generation
from tidegate.infer.sampling import row_seeds, sample_next
from tidegate.infer.step import Step, Unsupported, compile_step

__all__ = ["Generation", "Step", "Unsupported", "compile_step", "row_seeds", "sample_next"]
