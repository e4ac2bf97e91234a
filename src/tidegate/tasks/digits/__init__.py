"""Digits: scikit-learn's 8 x 8 images, read a pixel at a time. An offline stand-in for sequential MNIST."""

from tidegate.tasks.digits.data import digits, load_digits

__all__ = ["digits", "load_digits"]
