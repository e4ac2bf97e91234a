"""Pathfinder: two dashed curves among distractors; do the two circles end the same curve?"""

from tidegate.tasks.pathfinder.data import pathfinder

__all__ = ["pathfinder"]
