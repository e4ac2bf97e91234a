"""The cells' equations as their papers write them, a loop over time each: `outputs, *final states = run(...)`."""

from __future__ import annotations

import torch
from torch import sigmoid, tanh

GATES = {"i": "input_gate", "f": "forget_gate", "o": "output_gate"}  # which option an LSTM's gates go with


def run(name, cell, x, *state):
    """`cell` gives the weights; x (B, T, D)."""
    step, *weights = CELLS[name](cell)
    outputs = []
    for t in range(x.shape[1]):
        y, *state = step(*weights, x[:, t], *state)
        outputs.append(y)
    return torch.stack(outputs, 1), *state


def blocks(cell):
    """W and b of every gate, and every U with zeros between its heads."""
    gates, matrices = len(cell.bias_ih) // cell.width, len(cell.weight_hh) // cell.width
    U = [torch.block_diag(*own.chunk(cell.num_heads)) for own in cell.weight_hh.chunk(matrices)]
    return cell.weight_ih.chunk(gates), cell.bias_ih.chunk(gates), U


def elman(cell):
    (W,), (b,), (U,) = blocks(cell)
    phi = getattr(torch, cell.nonlinearity)

    def step(x, h):
        h = phi(x @ W.T + b + h @ U.T + cell.bias_hh)
        return h, h

    return (step,)


def gru(cell):
    W, b, U = blocks(cell)
    d = cell.bias_hh.chunk(3)

    def step(x, h):
        r, z = (sigmoid(x @ W[k].T + b[k] + h @ U[k].T + d[k]) for k in (0, 1))
        if cell.reset == "after":
            n = tanh(x @ W[2].T + b[2] + r * (h @ U[2].T + d[2]))
        else:
            n = tanh(x @ W[2].T + b[2] + (r * h) @ U[2].T + d[2])
        h = (1 - z) * n + z * h
        return h, h

    return (step,)


def ind_rnn(cell):
    phi = getattr(torch, cell.nonlinearity)

    def step(x, h):
        h = phi(x @ cell.weight_ih.T + cell.bias_ih + cell.u * h)
        return h, h

    return (step,)


def janet(cell):
    (Wf, Wg), (bf, bg), (Uf, Ug) = blocks(cell)

    def step(x, c):
        s = x @ Wf.T + bf + c @ Uf.T
        g = tanh(x @ Wg.T + bg + c @ Ug.T)
        c = sigmoid(s) * c + (1 - sigmoid(s - cell.beta)) * g
        return c, c

    return (step,)


def jordan(cell):
    (W,), (b,), (U, V) = blocks(cell)
    phi = getattr(torch, cell.nonlinearity)
    g = (lambda v: v) if cell.output_activation == "identity" else getattr(torch, cell.output_activation)

    def step(x, s):
        h = phi(x @ W.T + b + s @ U.T)
        y = g(h @ V.T + cell.vectors[0])
        return y, cell.alpha * s + y

    return (step,)


def lstm(cell):
    W, b, U = blocks(cell)
    d = cell.bias_hh.chunk(len(U))
    names = [k for k in "ifgo" if not (cell.coupled and k == "i") and getattr(cell, GATES.get(k, ""), True)]
    p = dict(zip(cell.cell.vectors, cell.vectors, strict=True)) if cell.cell.vectors else {}

    def normalised(v):
        return (v - v.mean(-1, keepdim=True)) / (v.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()

    def step(x, h, c):
        u = [h @ U[k].T for k in range(len(U))]
        if cell.layer_norm:  # over all gates, head by head
            all_gates = torch.stack(u, -2).unflatten(-1, (cell.num_heads, -1)).transpose(-2, -3)
            split = normalised(all_gates.flatten(-2)).unflatten(-1, (len(U), -1)).transpose(-2, -3).flatten(-2)
            u = [p[f"gain_{k}"] * split[..., n, :] for n, k in enumerate(names)]
        v = {k: x @ W[n].T + b[n] + u[n] + d[n] for n, k in enumerate(names)}
        look = {k: p.get(f"p_{k}", 0.0) for k in "ifo"}
        f = sigmoid(v["f"] + look["f"] * c) if "f" in v else 1.0
        i = 1 - f if cell.coupled else sigmoid(v["i"] + look["i"] * c) if "i" in v else 1.0
        c = f * c + i * (tanh(v["g"]) if cell.input_activation else v["g"])
        o = sigmoid(v["o"] + look["o"] * c) if "o" in v else 1.0
        read = c
        if cell.layer_norm:
            read = p["gain"] * normalised(c.unflatten(-1, (cell.num_heads, -1))).flatten(-2) + p["shift"]
        h = o * (tanh(read) if cell.output_activation else read)
        h = h if cell.weight_hr is None else h @ cell.weight_hr.T
        return h, h, c

    return (step,)


def mgu(cell):
    W, b, U = blocks(cell)
    own = dict(zip(cell.cell.vectors, cell.vectors, strict=True)) if cell.cell.vectors else {}

    def step(x, h):
        v = 0.0
        if cell.gate == "full":
            v = x @ W[0].T + b[0]
        if cell.gate != "bias":
            v = v + h @ U[0].T
        f = sigmoid(v + own.get("b_f", 0.0))
        candidate = x @ W[-1].T + b[-1]
        if cell.convention == "paper":
            h = (1 - f) * h + f * tanh(candidate + (f * h) @ U[-1].T)
        else:
            h = f * h + (1 - f) * tanh(candidate + f * (h @ U[-1].T + own["b_n"]))
        return h, h

    return (step,)


def rhn(cell):
    W, b, R = blocks(cell)
    kinds = len(W)  # h, t and perhaps c; then the same of the next micro-step
    later = () if cell.vectors is None else cell.vectors

    def step(x, s):
        for level in range(cell.depth):
            own = R[level * kinds : (level + 1) * kinds]
            if level == 0:
                v = [x @ W[k].T + b[k] + s @ own[k].T for k in range(kinds)]
            else:
                v = [later[(level - 1) * kinds + k] + s @ own[k].T for k in range(kinds)]
            t = sigmoid(v[1])
            s = tanh(v[0]) * t + s * (1 - t if cell.coupled else sigmoid(v[2]))
        return s, s

    return (step,)


def ugrnn(cell):
    W, b, U = blocks(cell)

    def step(x, h):
        v = [x @ W[k].T + b[k] + h @ U[k].T for k in range(len(W))]
        g, c = sigmoid(v[0]), tanh(v[1])
        new = g * h + (1 - g) * c
        if not cell.intersection:
            return new, new
        p, q = sigmoid(v[2]), torch.relu(v[3])
        return p * x + (1 - p) * q, new

    return (step,)


CELLS = {
    "elman": elman,
    "gru": gru,
    "ind-rnn": ind_rnn,
    "janet": janet,
    "jordan": jordan,
    "lstm": lstm,
    "mgu": mgu,
    "rhn": rhn,
    "ugrnn": ugrnn,
}
