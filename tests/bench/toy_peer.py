"""Adapters that need no other library: what a peer might do right and wrong."""

import torch
from adapter import adapts, fill
from torch import nn


@adapts("op/scan", "tidegate")
@adapts("op/scan", "right")
def scan(a, b):
    h, found = torch.zeros_like(b[:, 0]), []
    for t in range(b.shape[1]):
        h = a[:, t] * h + b[:, t]
        found.append(h)
    print("libraries print")
    return torch.stack(found, 1)


@adapts("op/scan", "wrong")
def no_decay(a, b):
    return b.cumsum(1) + 0 * a


@adapts("op/scan", "wrong gradients")
def half(a, b):
    return scan(a.detach(), b) + 0 * a


@adapts("op/scan", "broken")
def broken(a, b):
    raise RuntimeError("no triton here")


@adapts("op/scan", "short")
def short(a, b):
    if b.shape[1] > 128:
        raise MemoryError
    return scan(a, b)


def translate(weights):
    return {"weight": weights["w"].T}


@adapts("layer/lstm", "right")
def layer(options, weights):
    module = nn.Linear(options["dim"], options["dim"], bias=False)
    fill(module, translate(weights))
    return module, lambda x: module(x), translate


@adapts("layer/lstm", "tidegate")
def own(options, weights):
    if weights is None:
        return {"w": torch.randn(options["dim"], options["dim"])}
    module = nn.ParameterDict(weights)
    return module, lambda x: x @ module["w"], dict


@adapts("decode/lstm", "right")
@adapts("decode/lstm", "tidegate")
def decode(options, weights):
    if weights is None:
        return {"w": torch.randn(options["dim"], options["dim"])}
    total = torch.zeros(options["dim"])

    def step(token):
        total.add_(token[0])
        return token @ weights["w"] + total

    return step
