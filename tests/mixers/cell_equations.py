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


def antisymmetric_rnn(cell):
    W, b, (U,) = blocks(cell)
    A = U - U.T - cell.gamma * torch.eye(cell.dim, dtype=U.dtype)

    def step(x, h):
        v = h @ A.T
        gate = sigmoid(x @ W[0].T + b[0] + v) if cell.gated else 1.0
        h = h + cell.epsilon * gate * tanh(x @ W[-1].T + b[-1] + v)
        return h, h

    return (step,)


def brc(cell):
    (Wa, Wc, Wh), (ba, bc, bh) = cell.weight_ih.chunk(3), cell.bias_ih.chunk(3)
    if cell.neuromodulated:
        _, _, (Ua, Uc) = blocks(cell)
    else:
        Ua, Uc = (torch.diag(own) for own in cell.vectors)

    def step(x, h):
        a = 1 + tanh(x @ Wa.T + ba + h @ Ua.T)
        c = sigmoid(x @ Wc.T + bc + h @ Uc.T)
        h = c * h + (1 - c) * tanh(x @ Wh.T + bh + a * h)
        return h, h

    return (step,)


def co_rnn(cell):
    (W,), (b,), (Uy, Uz) = blocks(cell)
    dt, gamma, epsilon = cell.dt, cell.gamma, cell.epsilon

    def step(x, y, z):
        force = tanh(x @ W.T + b + y @ Uy.T + z @ Uz.T)
        if cell.implicit:  # z_t = z + dt (force - gamma y - epsilon z_t), solved for z_t
            z = (z + dt * force - dt * gamma * y) / (1 + dt * epsilon)
        else:
            z = z + dt * force - dt * gamma * y - dt * epsilon * z
        y = y + dt * z
        return y, y, z

    return (step,)


def cfn(cell):
    Wf, Wi, W = cell.weight_ih.chunk(3)
    bf, bi = cell.bias_ih.chunk(2)
    _, _, (Uf, Ui) = blocks(cell)

    def step(x, h):
        theta = sigmoid(h @ Uf.T + x @ Wf.T + bf)
        eta = sigmoid(h @ Ui.T + x @ Wi.T + bi)
        h = theta * tanh(h) + eta * tanh(x @ W.T)
        return h, h

    return (step,)


def elman(cell):
    (W,), (b,), (U,) = blocks(cell)
    phi = getattr(torch, cell.nonlinearity)

    def step(x, h):
        h = phi(x @ W.T + b + h @ U.T + cell.bias_hh)
        return h, h

    return (step,)


def fast_rnn(cell):
    (W,), (b,), (U,) = blocks(cell)
    phi, gate = getattr(torch, cell.nonlinearity), getattr(torch, cell.gate_nonlinearity)
    first, second = sigmoid(cell.shares)

    def step(x, h):
        n = phi(x @ W.T + h @ U.T + b)
        if cell.gated:
            z = gate(x @ W.T + h @ U.T + cell.gate_bias)
            h = (first * (1 - z) + second) * n + z * h
        else:
            h = first * n + second * h
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


def lem(cell):
    (W1, W2, Wz, Wy), (b1, b2, bz, by), (U1, U2, Uz, Uy) = blocks(cell)

    def step(x, y, z):
        d1 = cell.dt * sigmoid(x @ W1.T + b1 + y @ U1.T)
        d2 = cell.dt * sigmoid(x @ W2.T + b2 + y @ U2.T)
        z = (1 - d1) * z + d1 * tanh(x @ Wz.T + bz + y @ Uz.T)
        y = (1 - d2) * y + d2 * tanh(x @ Wy.T + by + z @ Uy.T)
        return y, y, z

    return (step,)


def li_gru(cell):
    (Wz, Wn), (bz, bn), (Uz, Un) = blocks(cell)
    phi = getattr(torch, cell.nonlinearity)

    def step(x, h):
        z = sigmoid(x @ Wz.T + bz + h @ Uz.T)
        h = z * h + (1 - z) * phi(x @ Wn.T + bn + h @ Un.T)
        return h, h

    return (step,)


def lstm(cell):
    W, b, matrices = blocks(cell)
    named = dict(zip(cell.cell.matrices, matrices, strict=False))
    U = [named[name] for name in named if name[0] == "U"]
    d = cell.bias_hh.chunk(len(U)) if cell.bias_hh is not None else [0.0] * len(U)
    names = [k for k in "ifgo" if not (cell.coupled and k == "i") and getattr(cell, GATES.get(k, ""), True)]
    p = dict(zip(cell.cell.vectors, cell.vectors, strict=True)) if cell.cell.vectors else {}

    def normalised(v):
        return (v - v.mean(-1, keepdim=True)) / (v.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()

    def step(x, h, c, *gates):
        u = [h @ U[k].T for k in range(len(U))]
        if cell.layer_norm:  # over all gates, head by head
            all_gates = torch.stack(u, -2).unflatten(-1, (cell.num_heads, -1)).transpose(-2, -3)
            split = normalised(all_gates.flatten(-2)).unflatten(-1, (len(U), -1)).transpose(-2, -3).flatten(-2)
            u = [p[f"gain_{k}"] * split[..., n, :] for n, k in enumerate(names)]
        v = {k: x @ W[n].T + b[n] + u[n] + d[n] for n, k in enumerate(names)}
        for k in v:  # with gate_recurrence
            seen = zip([name for name in names if name != "g"], gates, strict=True) if gates and k != "g" else ()
            v[k] = v[k] + sum(gate @ named[f"R_{j}{k}"].T for j, gate in seen)
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
        found = {"i": i, "f": f, "o": o}
        return h, h, c, *([found[k] for k in names if k != "g"] if gates else [])

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


def multiplicative_lstm(cell):
    (Wm, Wi, Wf, Wg, Wo), (bm, bi, bf, bg, bo), (Um, Ui, Uf, Ug, Uo) = blocks(cell)

    def step(x, h, c):
        m = (x @ Wm.T + bm) * (h @ Um.T)
        i, f, o = (sigmoid(x @ W.T + b + m @ U.T) for W, b, U in ((Wi, bi, Ui), (Wf, bf, Uf), (Wo, bo, Uo)))
        c = f * c + i * tanh(x @ Wg.T + bg + m @ Ug.T)
        h = o * tanh(c)
        return h, h, c

    return (step,)


def minimal_rnn(cell):
    (Uz,), (bu,), (Uh,) = blocks(cell)

    def step(x, h):
        z = tanh(x @ cell.encoder.weight.T + cell.encoder.bias)
        u = sigmoid(h @ Uh.T + z @ Uz.T + bu)
        h = u * h + (1 - u) * z
        return h, h

    return (step,)


def ran(cell):
    Wi, Wf, Wc = cell.weight_ih.chunk(3)
    bi, bf = cell.bias_ih.chunk(2)
    _, _, (Ui, Uf) = blocks(cell)

    def step(x, *state):
        h, c = state if cell.nonlinearity == "tanh" else state * 2
        i, f = sigmoid(h @ Ui.T + x @ Wi.T + bi), sigmoid(h @ Uf.T + x @ Wf.T + bf)
        c = i * (x @ Wc.T) + f * c
        return (tanh(c), tanh(c), c) if cell.nonlinearity == "tanh" else (c, c)

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


def star(cell):
    (Wz, Wk), (bz, bk), (Uk,) = blocks(cell)

    def step(x, h):
        z = tanh(x @ Wz.T + bz)
        s = x @ Wk.T + h @ Uk.T + bk
        k = sigmoid(s)
        written = k if cell.beta == 0 else 1 - sigmoid(-s - cell.beta)  # as the authors' code, where -s is the gate's
        h = tanh((1 - k) * h + written * z)
        return h, h

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
    "antisymmetric-rnn": antisymmetric_rnn,
    "brc": brc,
    "cfn": cfn,
    "co-rnn": co_rnn,
    "elman": elman,
    "fast-rnn": fast_rnn,
    "gru": gru,
    "ind-rnn": ind_rnn,
    "janet": janet,
    "jordan": jordan,
    "lem": lem,
    "li-gru": li_gru,
    "lstm": lstm,
    "mgu": mgu,
    "minimal-rnn": minimal_rnn,
    "multiplicative-lstm": multiplicative_lstm,
    "ran": ran,
    "rhn": rhn,
    "star": star,
    "ugrnn": ugrnn,
}
