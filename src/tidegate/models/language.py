"""A language model: any mixers in a stack, with a token embedding below and a head above."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tidegate.models import folder as files
from tidegate.models.block import Block
from tidegate.models.layers import Layers, parse
from tidegate.nn.parts import RMSNorm
from tidegate.segments import Segments
from tidegate.state import State

if TYPE_CHECKING:
    from tidegate.infer.generate import Generation


class LanguageModel(nn.Module):
    """Token embedding, pre-norm residual blocks, final norm, head: `logits, state = model(ids, state, segments)`.

    ids (B, T) int64, logits (B, T, vocab_size). One `State` holds what all layers remember, under "0", "1", ...

    `layers` is a pattern such as "4*gla" or "3*gated-deltanet,1*attention x 2", or a list of names and
    (name, options) pairs. `feed_forward` is "swiglu", "gelu", "channel-mix" (RWKV's, with a state) or "none", for all
    layers or as a list with one entry per layer. `dropout` acts on the embedding and on every residual branch.
    Embedding weights start normal with deviation 0.02; every part of a layer initialises itself.

    Raises ValueError for bad sizes, and for mixers or options that do not exist (naming the closest).

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
        for name, size in (("vocab_size", vocab_size), ("dim", dim), ("feed_forward_dim", feed_forward_dim or 1)):
            if size < 1:
                raise ValueError(f"{name}: seen {size}, wanted at least 1")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: seen {dropout}, wanted 0 <= dropout < 1")
        self.vocab_size, self.dim, self.layers = vocab_size, dim, parse(layers)
        self.feed_forward = feed_forward if isinstance(feed_forward, str) else list(feed_forward)
        self.feed_forward_dim, self.norm_eps = feed_forward_dim, norm_eps
        self.tie_embeddings, self.dropout = tie_embeddings, dropout
        each = [feed_forward] * len(self.layers) if isinstance(feed_forward, str) else list(feed_forward)
        if len(each) != len(self.layers):
            raise ValueError(f"feed_forward: {len(each)} entries for {len(self.layers)} layers; wanted one per layer")

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.embedding = nn.Embedding(vocab_size, dim, **factory)
        self.embedding_dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(
                dim,
                name,
                options,
                feed_forward=each[index],
                feed_forward_dim=feed_forward_dim,
                norm_eps=norm_eps,
                dropout=dropout,
                layer_index=index,
                num_layers=len(self.layers),
                **factory,
            )
            for index, (name, options) in enumerate(self.layers)
        )
        self.norm = RMSNorm(dim, eps=norm_eps, **factory)
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
        ids = self._checked(ids, state, segments)
        x = self.embedding_dropout(self.embedding(ids))
        side: dict[str, Tensor] = {}  # what layers of one call hand to later ones; no state
        after: dict[str, State] = {}
        for index, block in enumerate(self._stack()):
            name = str(index)
            x, after[name] = block(x, None if state is None else state[name], segments, side)
        return self.norm(x), State(after)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., dim) to (..., vocab_size)."""
        weight = self.embedding.weight if self.head is None else self.head.weight
        return nn.functional.linear(hidden, weight)

    def generate(self, prompt: Any, max_new_tokens: int = 256, **options: Any) -> Generation:
        """Stream a continuation of `prompt`; see `tidegate.infer.Generation` for the options and what comes back."""
        from tidegate.infer.generate import Generation  # the one place where a model looks down the house

        return Generation(self, prompt, max_new_tokens, **options)

    def _stack(self) -> list[Block]:
        return list(self.blocks)  # type: ignore[arg-type]

    def _checked(self, ids: Tensor, state: State | None, segments: Segments | None) -> Tensor:
        if ids.ndim != 2:
            raise ValueError(
                f"ids: seen shape {tuple(ids.shape)}, wanted (batch, time); ids[None] makes a batch of one"
            )
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise ValueError(f"ids: seen {ids.dtype}, wanted token numbers, torch.int64")
        if ids.shape[1] == 0:
            raise ValueError("ids: seen T = 0 tokens, wanted at least one")
        if segments is not None:
            if segments.shape != tuple(ids.shape):
                raise ValueError(f"segments: made for (batch, time) = {segments.shape}, but ids are {tuple(ids.shape)}")
            ids = segments.zero_padding(ids)
        traced = torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None
        if ids.device.type == "cpu" and ids.numel() and not traced:
            low, high = (int(end) for end in ids.aminmax())
            if low < 0 or high >= self.vocab_size:
                wrong = low if low < 0 else high
                raise ValueError(
                    f"ids: seen token {wrong}, but the vocabulary has the tokens 0 to {self.vocab_size - 1}"
                )
        if state is not None:
            self._check_state(state)
        return ids

    def _check_state(self, state: State) -> None:
        if not isinstance(state, State):
            raise ValueError(f"state: seen {type(state).__name__}, wanted the State returned by an earlier call")
        wanted = {str(index): block.stateful for index, block in enumerate(self._stack())}
        if list(state) != list(wanted):
            raise ValueError(
                f"state: has the entries {list(state)}, but this model's layers are {list(wanted)}; "
                "it belongs to another model"
            )
        for name, parts in wanted.items():
            if not isinstance(state[name], State) or tuple(state[name]) != parts:
                raise ValueError(f"state: layer {name} of this model keeps {list(parts)}; it belongs to another model")

    # -- about the model -------------------------------------------------------------------------------------------
    def init_state(self, batch_size: int, **options: Any) -> State:
        """The state before the first token; `device` and `dtype` as for a mixer."""
        return State({str(index): block.init_state(batch_size, **options) for index, block in enumerate(self._stack())})

    def state_spec(self) -> dict[str, Any]:
        """Shapes of the state without the batch, by layer and part."""
        return {str(index): block.state_spec() for index, block in enumerate(self._stack())}

    @property
    def num_parameters(self) -> int:
        """Trainable numbers, a tied embedding counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

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
