"""Generation: tokens one at a time, with the state at hand so that a session can go on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tidegate.infer.sampling import check_sampling, row_seeds, sample_next
from tidegate.infer.step import Step, compile_step
from tidegate.models.language import LanguageModel
from tidegate.segments import Segments
from tidegate.state import State

NO_TOKEN = -1  # what a row yields after its stop token


class Generation(Iterator[Tensor]):
    """A continuation being generated: iterate for tokens (B,) as they come, or take `all()`.

    `prompt` is one sequence of token numbers (a list or a tensor (T,)), a batch (B, T), or a list of sequences of
    unequal length. A tensor that is already padded comes with its `segments`. The prompt is read in one pass.
    `state` continues an earlier call: `model.generate(answer, state=generation.state)`.

    `stop` is a token, or several, that end a row; the stop token is yielded but not fed to the model, and the row gives
    -1 from then on while others go on. `temperature`, `top_k`, `top_p` are those of `sample_next`.

    `seed` is one number for all rows, or a list with one per row (see `row_seeds`); without one, torch's global
    generator provides it. Each row draws from a generator of its own, so what it gets depends neither on the rest of
    the batch nor on the padding.

    `compiled=True` runs single tokens through `compile_step`: several times faster on a CPU, after a second or two of
    preparation; or give the step of an earlier call. Once some rows have ended and others have not, the rest takes the
    ordinary way.

    Raises ValueError for an empty prompt, options out of range, or as the model does.

    >>> model = LanguageModel(vocab_size=8, dim=16, layers="lstm")
    >>> generation = model.generate([1, 2, 3], max_new_tokens=4, temperature=0)
    >>> [token.shape for token in generation] == [(1,)] * 4
    True
    >>> more = model.generate([5], max_new_tokens=2, state=generation.state).all()
    """

    def __init__(
        self,
        model: LanguageModel,
        prompt: Any,
        max_new_tokens: int = 256,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | Sequence[int] | None = None,
        stop: int | Sequence[int] | None = None,
        state: State | None = None,
        segments: Segments | None = None,
        compiled: bool | Step = False,
    ) -> None:
        check_sampling(temperature, top_k, top_p)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: seen {max_new_tokens}, wanted at least 1")
        device = model.embedding.weight.device
        ids, segments = _batch(prompt, segments, device)
        if seed is None:
            seed = int(torch.randint(2**62, ()))
        seeds = row_seeds(seed, ids.shape[0]) if isinstance(seed, int) else list(seed)
        if len(seeds) != ids.shape[0]:
            raise ValueError(f"seed: seen {len(seeds)} for {ids.shape[0]} prompts; wanted one per row, or one for all")
        self.model, self.max_new_tokens = model, max_new_tokens
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self.stop = torch.tensor([] if stop is None else [stop] if isinstance(stop, int) else list(stop)).to(device)
        self.finished = torch.zeros(ids.shape[0], dtype=torch.bool, device=device)
        self._generators = [torch.Generator().manual_seed(one) for one in seeds]
        self._tokens: list[Tensor] = []
        self._pending: Tensor | None = None  # yielded, but not yet fed to the model
        self._step = compile_step(model, ids.shape[0]) if compiled is True else compiled or None
        self._feed(ids, state, segments)

    def __iter__(self) -> Generation:
        return self

    def __next__(self) -> Tensor:
        if len(self._tokens) >= self.max_new_tokens or bool(self.finished.all()):
            raise StopIteration
        self._catch_up()
        return self._choose().clone()  # as in `state`

    @torch.inference_mode()
    def _choose(self) -> Tensor:
        chosen = sample_next(self._logits, self.temperature, self.top_k, self.top_p, self._generators)
        token = torch.where(self.finished, NO_TOKEN, chosen)
        self._pending = token
        self.finished = self.finished | torch.isin(token, self.stop)
        self._tokens.append(token)
        return token

    def all(self) -> Tensor:
        """Generate to the end; all new tokens (B, N), those already iterated over included."""
        for _ in self:
            pass
        return torch.stack(self._tokens, dim=1).clone()

    @property
    def state(self) -> State:
        """The state after the prompt and everything yielded so far, without stop tokens."""
        self._catch_up()
        return self._state.map(torch.clone)  # tensors made in inference mode could not take part in training

    def _catch_up(self) -> None:
        """Feed the last yielded tokens; a row that has ended keeps its state."""
        if self._pending is None:
            return
        ids, self._pending = self._pending[:, None], None
        if not bool(self.finished.all()):
            running = ~self.finished[:, None]
            self._feed(ids, self._state, None if bool(running.all()) else Segments.padded(running))

    @torch.inference_mode()
    def _feed(self, ids: Tensor, state: State | None, segments: Segments | None) -> None:
        if self._step is not None and state is not None and segments is None and ids.shape[1] == 1:
            logits, self._state = self._step(ids, state)
            self._logits = logits[:, 0]
            return
        training = self.model.training
        if training:
            self.model.eval()
        try:
            hidden, self._state = self.model.hidden(ids, state, segments)
        finally:
            if training:
                self.model.train()
        if segments is None:
            last = hidden[:, -1]
        else:
            time = torch.arange(ids.shape[1], device=ids.device)
            last = hidden[torch.arange(ids.shape[0], device=ids.device), torch.where(segments.valid, time, 0).amax(1)]
        self._logits = self.model.logits(last)


def _batch(prompt: Any, segments: Segments | None, device: torch.device) -> tuple[Tensor, Segments | None]:
    """Ids (B, T), and segments if anything is padded."""
    if isinstance(prompt, Tensor):
        ids = prompt[None] if prompt.ndim == 1 else prompt
    else:
        rows = list(prompt)
        if rows and isinstance(rows[0], int):
            rows = [rows]
        rows = [torch.as_tensor(row, dtype=torch.int64) for row in rows]
        if not rows or any(row.ndim != 1 or not len(row) for row in rows):
            raise ValueError("prompt: wanted at least one token in every row, as in [1, 2] or [[1, 2], [3]]")
        if segments is not None and len({len(row) for row in rows}) > 1:
            raise ValueError(
                "segments: rows of unequal length are padded here; give segments with a padded tensor only"
            )
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        if segments is None and len({len(row) for row in rows}) > 1:
            length = torch.tensor([len(row) for row in rows])
            segments = Segments.padded(torch.arange(ids.shape[1]) < length[:, None])
    if ids.numel() == 0:
        raise ValueError("prompt: it is empty, wanted at least one token")
    if segments is not None:
        if segments.shape != tuple(ids.shape):
            raise ValueError(f"segments: made for (batch, time) = {segments.shape}, but ids are {tuple(ids.shape)}")
        if not bool(segments.valid.any(1).all()):
            raise ValueError("prompt: a row is nothing but padding, wanted at least one token in every row")
        segments = segments.to(device)
    return ids.to(device=device), segments
