"""A language model: any mixers in a stack, with a token embedding below and a head above."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tidegate import registry
from tidegate.models import folder as files
from tidegate.models.layers import Layers
from tidegate.models.stack import Stack
from tidegate.segments import Segments
from tidegate.state import State

if TYPE_CHECKING:
    from tidegate.infer.generate import Generation


class LanguageModel(Stack):
    """Token embedding, pre-norm residual blocks, final norm, head: `logits, state = model(ids, state, segments)`.

    ids (B, T) int64, logits (B, T, vocab_size). One `State` holds what all layers remember, under "0", "1", ...

    `layers` is a pattern such as "4*gla" or "3*gated-deltanet,1*attention x 2", or a list of names and
    (name, options) pairs. `feed_forward` is "swiglu", "gelu", "channel-mix" (RWKV's, with a state) or "none", for all
    layers or as a list with one entry per layer. `dropout` acts on the embedding and on every residual branch.
    Embedding weights start normal with deviation 0.02; every part of a layer initialises itself.

    Raises ValueError for bad sizes, for mixers or options that do not exist (naming the closest), and for mixers that
    see later tokens or need all of them at once.

    >>> model = LanguageModel(vocab_size=256, dim=32, layers="2*lstm")
    >>> logits, state = model(torch.randint(256, (1, 5)))
    >>> logits, state = model(torch.randint(256, (1, 1)), state)
    >>> logits.shape
    torch.Size([1, 1, 256])
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        layers: Layers,
        *,
        feed_forward: str | Sequence[str] = "swiglu",
        feed_forward_dim: int | None = None,
        norm_eps: float = 1e-6,
        tie_embeddings: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._check_sizes(vocab_size=vocab_size, dim=dim, feed_forward_dim=feed_forward_dim or 1, dropout=dropout)
        self.vocab_size, self.tie_embeddings = vocab_size, tie_embeddings
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.embedding = nn.Embedding(vocab_size, dim, **factory)
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
        for index, name in self._whole_only.items():
            raise ValueError(
                f"layers: {name!r} (layer {index}) cannot predict a next token from those before it: "
                f"{'; '.join(registry.info(name).exceptions.values())}. Use it in a SequenceModel"
            )
        self.head = None if tie_embeddings else nn.Linear(dim, vocab_size, bias=False, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The embedding and the head; blocks have initialised themselves."""
        nn.init.normal_(self.embedding.weight, std=0.02)
        if self.head is not None:
            nn.init.normal_(self.head.weight, std=0.02)

    # -- running ---------------------------------------------------------------------------------------------------
    def forward(
        self, ids: Tensor, state: State | None = None, segments: Segments | None = None
    ) -> tuple[Tensor, State]:
        """Logits (B, T, vocab_size) of each next token, and the state after the last one.

        ids (B, T); on padding any id may stand, and the logits there mean nothing.
        Raises ValueError for a wrong shape, T = 0, ids outside the vocabulary (looked at on the CPU), segments of
        another shape, or a state of another model.
        """
        hidden, state = self.hidden(ids, state, segments)
        return self.logits(hidden), state

    def hidden(self, ids: Tensor, state: State | None = None, segments: Segments | None = None) -> tuple[Tensor, State]:
        """As `forward`, but what the head would see, (B, T, dim): for prompts, of which only the last token counts."""
        ids = self._check_ids(ids, self.vocab_size, segments)
        self._check_state(state)
        x, after = self._run(self.embedding_dropout(self.embedding(ids)), state, segments)
        return x, State(after)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., dim) to (..., vocab_size)."""
        weight = self.embedding.weight if self.head is None else self.head.weight
        return nn.functional.linear(hidden, weight)

    def generate(self, prompt: Any, max_new_tokens: int = 256, **options: Any) -> Generation:
        """Stream a continuation of `prompt`; see `tidegate.infer.Generation` for the options and what comes back."""
        from tidegate.infer.generate import Generation  # the one place where a model looks down the house

        return Generation(self, prompt, max_new_tokens, **options)

    # -- about the model -------------------------------------------------------------------------------------------
    def config(self) -> dict[str, Any]:
        """The constructor's arguments as plain values, patterns spelled out: `LanguageModel(**model.config())`."""
        return {
            "vocab_size": self.vocab_size,
            "dim": self.dim,
            "layers": [[name, dict(options)] for name, options in self.layers],
            "feed_forward": self.feed_forward,
            "feed_forward_dim": self.feed_forward_dim,
            "norm_eps": self.norm_eps,
            "tie_embeddings": self.tie_embeddings,
            "dropout": self.dropout,
        }

    # -- files -----------------------------------------------------------------------------------------------------
    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write model.safetensors and config.json into `folder`, each whole or not at all."""
        files.save(self, self.config(), folder)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> LanguageModel:
        """The model that `save` wrote, bit for bit, in evaluation mode.

        Raises ValueError, in one line, for a file that is missing, damaged, or does not fit the other.
        """
        config = files.read_config(folder, cls.__name__)
        with torch.random.fork_rng(devices=[]):  # what is drawn here is overwritten; the caller's stream goes on
            try:
                model = cls(**config)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{os.fspath(folder)}/{files.CONFIG}: describes no model ({error})") from None
        files.load_tensors(model, folder)
        return model.eval()
