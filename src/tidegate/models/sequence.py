"""A model of sequences: token numbers or real features in; an answer at every position, or one for the whole, out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tidegate.models.layers import Layers
from tidegate.models.stack import Stack
from tidegate.nn.mixer import accumulation_dtype
from tidegate.segments import Segments, zero_padding
from tidegate.state import State

POOLS = ("mean", "last")


class SequenceModel(Stack):
    """The blocks of a language model between other ends: `outputs, state = model(inputs, state, segments)`.

    Inputs are token numbers (B, T) with `vocab_size`, or real numbers (B, T, features) with `features`. Outputs are
    (B, T, outputs), or with `pool` (B, outputs): a linear map of the "mean" over the row's real tokens, or of the
    "last". The state goes on counting, so that pieces give what the whole gives; of packed documents the last counts.

    - Token embeddings start normal with deviation `embedding_std`; a linear map takes features to `dim`. The head is a
      linear map with bias.
    - `padding` is a token number that stands for padding: wherever it stands, `segments` say so, too.
    - `layers`, `feed_forward`, `norm_eps` and `dropout` are those of `LanguageModel`.

    Raises ValueError for bad sizes, and for mixers or options that do not exist (naming the closest).

    >>> model = SequenceModel(16, "2*gla", features=3, outputs=10, pool="mean")
    >>> outputs, state = model(torch.randn(4, 7, 3))
    >>> outputs.shape
    torch.Size([4, 10])
    >>> SequenceModel(16, "gla", vocab_size=5, outputs=2)(torch.randint(5, (4, 7)))[0].shape
    torch.Size([4, 7, 2])
    """

    def __init__(
        self,
        dim: int,
        layers: Layers,
        *,
        outputs: int,
        vocab_size: int | None = None,
        features: int | None = None,
        pool: str | None = None,
        padding: int | None = None,
        embedding_std: float = 1.0,
        feed_forward: str | Sequence[str] = "swiglu",
        feed_forward_dim: int | None = None,
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if (vocab_size is None) == (features is None):
            raise ValueError(
                f"vocab_size, features: seen {vocab_size} and {features}, wanted one of them: vocab_size for token "
                "numbers, features for real numbers"
            )
        inputs = {"features": features} if vocab_size is None else {"vocab_size": vocab_size}
        sizes: dict[str, Any] = {"dim": dim, "outputs": outputs, "feed_forward_dim": feed_forward_dim or 1, **inputs}
        self._check_sizes(dropout=dropout, **sizes)
        if pool not in (None, *POOLS):
            raise ValueError(f"pool: seen {pool!r}, wanted None or one of {', '.join(POOLS)}")
        if padding is not None and not 0 <= padding < (vocab_size or 0):
            raise ValueError(f"padding: seen {padding}, wanted a token number below vocab_size = {vocab_size}")
        self.outputs, self.vocab_size, self.features, self.pool, self.padding = (
            outputs, vocab_size, features, pool, padding,
        )  # fmt: skip
        self.embedding_std = embedding_std
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.embedding: nn.Embedding | nn.Linear
        if vocab_size is None:
            self.embedding = nn.Linear(features or 0, dim, **factory)
        else:
            self.embedding = nn.Embedding(vocab_size, dim, **factory)
            nn.init.normal_(self.embedding.weight, std=embedding_std)
        self.embedding_dropout = nn.Dropout(dropout)
        self._build_blocks(
            dim,
            layers,
            feed_forward=feed_forward,
            feed_forward_dim=feed_forward_dim,
            norm_eps=norm_eps,
            dropout=dropout,
            **factory,
        )
        self.head = nn.Linear(dim, outputs, **factory)

    def forward(
        self, inputs: Tensor, state: State | None = None, segments: Segments | None = None
    ) -> tuple[Tensor, State]:
        """Outputs, and the state after the last position. What stands on padding does not matter.

        Raises ValueError for a wrong shape or type, T = 0, ids outside the vocabulary (looked at on the CPU), segments
        of another shape, or a state of another model.
        """
        if self.padding is not None and inputs.ndim == 2:
            real = Segments.padded(inputs != self.padding)
            segments = real if segments is None else segments & real
        if self.vocab_size is not None:
            inputs = self._check_ids(inputs, self.vocab_size, segments)
        else:
            inputs = self._check_features(inputs, segments)
        self._check_state(state)
        x, after = self._run(self.embedding_dropout(self.embedding(inputs)), state, segments)
        if self.pool is None:
            return self.head(x), State(after)
        before = self._pool_state(x.shape[0], x.device, x.dtype) if state is None else state["pool"]
        pooled, after["pool"] = self._pooled(x, before, segments)
        return self.head(pooled), State(after)

    def _pooled(self, x: Tensor, before: State, segments: Segments | None) -> tuple[Tensor, State]:
        """(B, dim) of the last document in each row, and what its next piece needs."""
        if segments is None:
            mine = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
            goes_on = mine[:, :1]
        else:
            mine, goes_on = segments.in_last_document(), segments.documents[:, -1:] == 0
        before = before.map(lambda leaf: torch.where(goes_on, leaf, 0))
        if self.pool == "mean":
            kept = torch.where(mine[..., None], x, 0).to(before["sum"].dtype)
            after = State(sum=before["sum"] + kept.sum(1), count=before["count"] + mine.sum(1, keepdim=True))
            return (after["sum"] / after["count"].clamp(min=1)).to(x.dtype), after
        order = torch.arange(1, x.shape[1] + 1, device=x.device)
        last = torch.where(mine, order, 0).amax(1, keepdim=True)  # 0: there is none in this piece
        seen = torch.where((order == last)[..., None], x, 0).sum(1)
        pooled = torch.where(last == 0, before["last"].to(x.dtype), seen)
        return pooled, State(last=pooled.to(before["last"].dtype))

    def _check_features(self, inputs: Tensor, segments: Segments | None) -> Tensor:
        if inputs.ndim != 3 or inputs.shape[-1] != self.features:
            raise ValueError(
                f"inputs: seen shape {tuple(inputs.shape)}, wanted (batch, time, features={self.features})"
            )
        if not inputs.is_floating_point():
            raise ValueError(f"inputs: seen {inputs.dtype}, wanted real numbers; for token numbers give vocab_size")
        if inputs.shape[1] == 0:
            raise ValueError("inputs: seen T = 0 positions, wanted at least one")
        return zero_padding(inputs, segments)

    # -- the state -----------------------------------------------------------------------------------------------------
    def _entries(self) -> dict[str, tuple[str, ...]]:
        return super()._entries() | ({} if self.pool is None else {"pool": tuple(self._pool_spec())})

    def _pool_spec(self) -> dict[str, tuple[int, ...]]:
        return {"sum": (self.dim,), "count": (1,)} if self.pool == "mean" else {"last": (self.dim,)}

    def _pool_state(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> State:
        kind = accumulation_dtype(dtype)
        return State(
            {name: torch.zeros(batch, *shape, device=device, dtype=kind) for name, shape in self._pool_spec().items()}
        )

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """The state before the first position; `device` and `dtype` as for a mixer."""
        state = super().init_state(batch_size, device=device, dtype=dtype)
        if self.pool is None:
            return state
        weight = self.head.weight
        return State({**state, "pool": self._pool_state(batch_size, device or weight.device, dtype or weight.dtype)})

    def state_spec(self) -> dict[str, Any]:
        """Shapes of the state without the batch, by layer and part."""
        return super().state_spec() | ({} if self.pool is None else {"pool": self._pool_spec()})
