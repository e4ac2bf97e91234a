"""Signals: real numbers over time, to be delayed, added, told apart or multiplied."""

from tidegate.tasks.signals.data import adding, band_signals, delay, products, reconstruct, white_signal

__all__ = ["adding", "band_signals", "delay", "products", "reconstruct", "white_signal"]
