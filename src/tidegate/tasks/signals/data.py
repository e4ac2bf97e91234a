"""Generators of signals: endless, exact, a pure function of the random generator handed in."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from tidegate.tasks.targets import check_sizes


def white_signal(
    batch: int, generator: Generator, *, length: int = 1000, dt: float = 1e-3, freq: float = 5.0, rms: float = 0.5
) -> Tensor:
    """White noise without anything above `freq`: (batch, length), periodic, and shifted so that it starts at 0.

    The spectrum is complex normal with its share above `freq` taken out; `rms` is the root mean square before the
    shift. `dt` is the time between samples, so that frequencies up to 1 / (2 dt) exist.

    >>> signal = white_signal(2, torch.Generator().manual_seed(0), length=100, dt=0.01)
    >>> signal.shape, signal[:, 0].tolist()
    (torch.Size([2, 100]), [0.0, 0.0])
    """
    check_sizes(batch=batch, length=length)
    if not (dt > 0 and freq * dt * length >= 1):
        raise ValueError(f"freq, dt: seen {freq} and {dt}, wanted freq >= 1 / (length dt): the lowest tone there is")
    half = (length + 1) // 2
    scale = rms * math.sqrt(0.5)
    real, imaginary = scale * torch.randn(2, batch, half + 1, generator=generator)
    imaginary[:, -1] = 0  # the highest frequency of an even number of samples is real
    spectrum = torch.complex(real, imaginary)
    silent = torch.fft.rfftfreq(2 * half, dt) > freq
    silent[0] = True
    spectrum = spectrum.masked_fill(silent, 0) / math.sqrt(1 - (silent.sum().item() - 1) / half)
    signal = torch.fft.irfft(spectrum * math.sqrt(2 * half), n=2 * half)[:, :length]
    return signal - signal[:, :1]


def delay(
    batch: int, generator: Generator, *, length: int = 4000, lag: int = 1000, dt: float = 1e-3, freq: float = 1000.0
) -> tuple[Tensor, Tensor]:
    """A white signal, and the same `lag` samples later with zeros before: both (batch, length, 1).

    >>> inputs, targets = delay(1, torch.Generator().manual_seed(0), length=8, lag=6, dt=0.125)
    >>> bool((targets[0, 6:] == inputs[0, :2]).all()), targets[0, :6].abs().sum().item()
    (True, 0.0)
    """
    check_sizes(lag=lag)
    if lag >= length:
        raise ValueError(f"lag: seen {lag}, wanted less than length = {length}")
    signal = white_signal(batch, generator, length=length, dt=dt, freq=freq)[..., None]
    return signal, torch.nn.functional.pad(signal, (0, 0, lag, 0))[:, :length]


def reconstruct(
    batch: int, generator: Generator, *, length: int = 1000, memory: int = 500, dt: float = 1e-3, freq: float = 5.0
) -> tuple[Tensor, Tensor]:
    """A white signal (batch, length, 1); the targets (batch, memory) are its last samples: one answer, at the end.

    >>> inputs, targets = reconstruct(1, torch.Generator().manual_seed(0), length=100, memory=3, dt=0.01)
    >>> torch.equal(inputs[:, -3:, 0], targets)
    True
    """
    check_sizes(memory=memory)
    if memory > length:
        raise ValueError(f"memory: seen {memory}, wanted at most length = {length}")
    signal = white_signal(batch, generator, length=length, dt=dt, freq=freq)
    return signal[..., None], signal[:, length - memory :]


def adding(batch: int, generator: Generator, *, length: int = 100) -> tuple[Tensor, Tensor]:
    """Uniform numbers and marks on two of them, one in each half: what is their sum?

    Returns inputs (batch, length, 2), numbers and marks, and targets (batch, 1). Answering 1 always has a mean square
    error of 1/6.

    >>> inputs, targets = adding(1, torch.Generator().manual_seed(0), length=4)
    >>> inputs[0, :, 1].tolist(), torch.equal((inputs[..., 0] * inputs[..., 1]).sum(1, keepdim=True), targets)
    ([0.0, 1.0, 0.0, 1.0], True)
    """
    check_sizes(batch=batch)
    if length < 2:
        raise ValueError(f"length: seen {length}, wanted at least 2, one number for each half")
    numbers = torch.rand(batch, length, generator=generator)
    first = torch.randint(length // 2, (batch, 1), generator=generator)
    second = torch.randint(length // 2, length, (batch, 1), generator=generator)
    both = torch.cat([first, second], 1)
    marks = torch.zeros(batch, length).scatter(1, both, 1)
    return torch.stack([numbers, marks], -1), numbers.gather(1, both).sum(1, keepdim=True)


def band_signals(
    batch: int,
    generator: Generator,
    *,
    length: int = 256,
    frequencies: Sequence[float] = (2, 4, 8),
    noise: float = 0.5,
    noise_freq: float = 16.0,
) -> tuple[Tensor, Tensor]:
    """One second of a sine in noise: which of the frequencies (Hz) is it?

    The phase is random; the noise is a white signal of root mean square `noise` without anything above `noise_freq`,
    so that every second sample tells the same story: `inputs[:, ::2]` is the signal at half the rate.

    Returns inputs (batch, length, 1) and the number of the frequency (batch,).

    >>> inputs, classes = band_signals(2, torch.Generator().manual_seed(0))
    >>> inputs.shape, classes.shape
    (torch.Size([2, 256, 1]), torch.Size([2]))
    """
    check_sizes(batch=batch, length=length, frequencies=len(frequencies))
    classes = torch.randint(len(frequencies), (batch,), generator=generator)
    cycles = torch.tensor([float(freq) for freq in frequencies])[classes, None]
    phase = torch.rand(batch, 1, generator=generator)
    sine = torch.sin(2 * math.pi * (cycles * torch.arange(length) / length + phase))
    noisy = white_signal(batch, generator, length=length, dt=1 / length, freq=noise_freq, rms=noise)
    return (sine + noisy)[..., None], classes


def products(batch: int, generator: Generator, *, length: int = 64, decay: float = 0.8) -> tuple[Tensor, Tensor]:
    """y_t = decay y_{t-1} + u_t u_{t-1} of white noise u: nothing that is linear in u can follow it (Liquid-S4).

    Returns inputs u and targets y, both (batch, length, 1); before the first sample, u and y are 0. The mean square
    of y is 1 / (1 - decay^2), which is the error of answering 0.

    >>> inputs, targets = products(1, torch.Generator().manual_seed(0), length=3, decay=0.5)
    >>> u, y = inputs.flatten(), targets.flatten()
    >>> bool(torch.isclose(y[2], 0.5 * u[0] * u[1] + u[1] * u[2])), y[0].item()
    (True, 0.0)
    """
    check_sizes(batch=batch, length=length)
    u = torch.randn(batch, length, generator=generator)
    y = [torch.zeros(batch)]
    for t in range(1, length):
        y.append(decay * y[-1] + u[:, t] * u[:, t - 1])
    return u[..., None], torch.stack(y, 1)[..., None]
