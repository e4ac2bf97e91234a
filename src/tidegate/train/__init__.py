"""Training: a recipe in, a folder with the model, its scores and its picture out; interruptible at any moment."""

from tidegate.train.recipe import Recipe
from tidegate.train.run import Result, train

__all__ = ["Recipe", "Result", "train"]
