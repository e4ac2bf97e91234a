"""One recurrence of a run, looked at as a linear dynamical system."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tidegate.methods.explain.matrices import Matrices, constant, multiplied_out, run
from tidegate.methods.explain.members import MEMBERS
from tidegate.segments import Segments

MOST = 1 << 27  # numbers in one tensor: a gigabyte of float64


@dataclasses.dataclass(frozen=True)
class System:
    """A call of a recurrence, in the form of the Dynamical Systems Framework (arXiv 2405.15731), in float64.

    Equation, per head; S is N x V, v_t what token t writes, M x V with M = 1 unless a token takes several steps::

        S_t = transition_t S_{t-1} + input_t v_t
        o_t = readout_t S_t + skip_t v_t (+ beside_t)

        o = attention v (+ beside)        attention_ts = readout_t transition_t ... transition_{s+1} input_s, s <= t

    A head is what shares one attention matrix: of linear attention a head, of an elementwise scan every channel. A
    normaliser eta_t that divides the read-out stands in the transition, as eta_{t-1} / eta_t, and in the input, as
    1 / eta_t: the framework's form of attention. There is no other way for it to be in the system and leave the
    read-out to the query alone. For a softmax, whose features are infinitely many, the state is a slot for each token,
    which is all of them that this sequence can tell apart.

    Everything but the name is computed when asked for, and kept.

    - `reads_before`: o_t reads S_{t-1} (RWKV-6); then skip_t alone sees token t.
    - `backwards`: the scan ran from the right, and the last token comes first in all of this.
    """

    op: str
    layer: str  # the module that called, as in `named_modules()`
    arguments: Mapping[str, Any] = dataclasses.field(repr=False)
    output: Tensor = dataclasses.field(repr=False)  # what the op gave, as it gave it
    heads: Any = dataclasses.field(default=None, repr=False)

    # -- the system ------------------------------------------------------------------------------------------------
    @property
    def transition(self) -> Tensor:
        """(B, T, H, 1) a number, (B, T, H, N) a diagonal, or (B, T, H, N, N). A document's first acts on nothing."""
        plain = self.matrices.transition
        if self.matrices.log_normaliser is None:
            return plain
        return plain * _like(self._ratio, plain)

    @property
    def input(self) -> Tensor:
        """(B, T, H, N, M)."""
        return self._divided(self.matrices.input, -1)

    @property
    def readout(self) -> Tensor:
        """(B, T, H, N)."""
        return self._divided(self.matrices.readout, 1)

    @property
    def skip(self) -> Tensor | None:
        """(B, T, H, M), what reaches the output without the state; None for nothing."""
        return self.matrices.skip

    @property
    def beside(self) -> Tensor | None:
        """(B, T, H, V), what the output has in addition, whatever the sequence (SRU's highway); None for nothing."""
        return self.matrices.beside

    @property
    def values(self) -> Tensor:
        """(B, T, H, M, V)."""
        return self.matrices.values

    @property
    def normaliser(self) -> Tensor | None:
        """eta (B, T, H), None where nothing is normalised."""
        return None if self.matrices.log_normaliser is None else self.matrices.log_normaliser.exp()

    @property
    def reads_before(self) -> bool:
        return self.matrices.reads_before

    @property
    def backwards(self) -> bool:
        return self.matrices.backwards

    @property
    def segments(self) -> Segments | None:
        """Documents and padding that the op was given; the state starts empty in each document."""
        return self.matrices.segments

    # -- as a matrix -----------------------------------------------------------------------------------------------
    @cached_property
    def attention(self) -> Tensor:
        """(B, H, T, T M): how much of what token s wrote is in what token t reads. Column s M + m is its m-th step.

        Raises ValueError where it would not fit into memory.
        """
        batch, time, heads, states, steps = self.matrices.input.shape
        count = batch * heads * time * time * steps * max(1, states // time)
        if count > MOST:
            raise ValueError(
                f"attention: {batch} x {heads} heads x {time}^2 tokens make {count:.1e} numbers, wanted at most "
                f"{MOST:.1e}; give fewer tokens, or look at some heads only: system.select(slice(0, 8)).attention"
            )
        phi = multiplied_out(self.matrices)
        return phi if self.values.is_complex() or not phi.is_complex() else phi.real

    def rebuilt(self) -> Tensor:
        """The op's output from the matrix: attention times values, in the shape and dtype of `output`."""
        v = self.values.movedim(1, 2).flatten(2, 3)  # (B, H, T M, V)
        o = (self.attention.to(torch.promote_types(self.attention.dtype, v.dtype)) @ v).movedim(2, 1)
        if self.beside is not None:
            o = o + self.beside
        return self._as_output(o)

    def recurrent(self) -> Tensor:
        """The op's output from `transition`, `input` and `readout`, token by token, in its shape and dtype."""
        system = dataclasses.replace(
            self.matrices, transition=self.transition, input=self.input, readout=self.readout, log_normaliser=None
        )
        return self._as_output(run(system))

    # -- what it remembers -----------------------------------------------------------------------------------------
    @cached_property
    def eigenvalues(self) -> Tensor:
        """(B, T, H, 1 or N) complex: those of every token's transition. A document's first acts on nothing."""
        transition = self.transition
        if transition.ndim == 4:
            return transition.to(torch.complex128)
        if constant(transition):  # one matrix for all tokens
            return torch.linalg.eigvals(transition[:1, :1]).expand(transition.shape[:-1])
        return torch.linalg.eigvals(transition)

    @cached_property
    def decay_profile(self) -> Tensor:
        """(B, H, T): the mean of |attention[t, t - l]| over t, for every lag l.

        Over all pairs of tokens of the same document; a lag that no pair has is 0. Steps of a token add up.
        """
        size = self.attention.abs()
        batch, heads, time, columns = size.shape
        size = size.unflatten(-1, (time, columns // time)).sum(-1)
        pairs = torch.ones(batch, time, time, dtype=torch.bool, device=size.device).tril()
        if self.segments is not None:
            document, valid = self.segments.documents, self.segments.valid
            pairs = pairs & (document[:, :, None] == document[:, None]) & valid[:, :, None] & valid[:, None]
        at = torch.arange(time, device=size.device)
        lag = (at[:, None] - at).clamp(min=0).expand(batch, heads, time, time).flatten(2)
        sums, counts = (
            torch.zeros(batch, heads, time, dtype=size.dtype, device=size.device).scatter_add(2, lag, x.flatten(2))
            for x in (size * pairs[:, None], pairs[:, None].expand_as(size).to(size.dtype))
        )
        return sums / counts.clamp(min=1)

    @property
    def memory_length(self) -> Tensor:
        """(B, H): the mean lag in tokens, weighted by the decay profile p: sum_l l p(l) / sum_l p(l).

        0 sees itself only. A constant decay a over a long sequence has a / (1 - a), a plain sum over all T tokens
        (T - 1) / 2: it cannot show more than the sequence has. A head that attends to nothing has NaN.
        """
        profile = self.decay_profile
        lags = torch.arange(profile.shape[-1], dtype=profile.dtype, device=profile.device)
        return (profile * lags).sum(-1) / profile.sum(-1)

    @property
    def time_constant(self) -> Tensor:
        """(B, H): in how many tokens the state falls to 1/e, by the transitions alone: -1 / mean log |eigenvalue|.

        The mean is over the head's eigenvalues and over tokens, but for the first of a document. 0 for one that forgets
        at once, infinite for one that on average keeps or grows. It knows nothing of what is read, and so nothing of
        what a delta rule overwrites or a softmax does not look at.
        """
        counted = ~self.matrices.first()
        logs = torch.where(counted[..., None, None], self.eigenvalues.abs().log(), 0).mean(-1).sum(1)
        mean = logs / counted.sum(1, keepdim=True)
        return torch.where(mean < 0, -1 / mean, torch.inf)

    def select(self, heads: Any) -> System:
        """The same, of these heads only: a slice, or a list of numbers."""
        return dataclasses.replace(self, heads=heads)

    # -- inside ----------------------------------------------------------------------------------------------------
    @cached_property
    def matrices(self) -> Matrices:
        """What the op's equation is made of, with a normaliser in the read-out, where it cannot overflow."""
        given = {name: _wide(x) for name, x in self.arguments.items()}
        system = MEMBERS[self.op](**given)
        return system if self.heads is None else system.select(self.heads)

    @property
    def _ratio(self) -> Tensor:
        """eta_{t-1} / eta_t (B, T, H), 1 where nothing came before."""
        log = self.matrices.log_normaliser
        assert log is not None
        before = torch.arange(log.shape[1], device=log.device)[None] - 1
        if self.segments is not None:
            before = self.segments.previous()
        earlier = log.gather(1, before.clamp(min=0)[..., None].expand_as(log))
        return torch.exp(torch.where(before[..., None] < 0, 0, earlier - log))

    def _divided(self, x: Tensor, power: int) -> Tensor:
        """x times eta^power."""
        log = self.matrices.log_normaliser
        return x if log is None else x * _like(torch.exp(power * log), x)

    def _as_output(self, o: Tensor) -> Tensor:
        o = o.flip(1) if self.backwards else o
        if o.is_complex() and not self.output.is_complex():
            o = o.real
        shape = self.output.shape if self.heads is None else o.shape
        return o.reshape(shape).to(self.output.dtype)


def _wide(x: Any) -> Any:
    if not isinstance(x, Tensor) or not (x.is_floating_point() or x.is_complex()):
        return x
    return x.detach().to(torch.complex128 if x.is_complex() else torch.float64)


def _like(factor: Tensor, x: Tensor) -> Tensor:
    return factor.reshape(*factor.shape, *[1] * (x.ndim - factor.ndim))
