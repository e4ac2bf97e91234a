"""What Lightning trains: the model, its loss, its optimiser, and a stop when the numbers go bad."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from tidegate.nn.mixer import constrain_
from tidegate.nn.schedule import factor
from tidegate.nn.weight_decay import weight_decay_groups
from tidegate.tasks.language.data import segments_of
from tidegate.tasks.language.tokenizer import Tokenizer
from tidegate.train.checkpoint import checkpoints
from tidegate.train.recipe import Recipe


class Diverged(ValueError):
    """The loss or a gradient became infinite or NaN."""


class LanguageModule(LightningModule):
    """Next-token training on packed rows.

    After every optimiser step, `last` holds that step's loss (nats per token), bits per byte, learning rate and
    gradient norm, averaged over devices and accumulated parts.
    """

    def __init__(self, recipe: Recipe, model: nn.Module, tokenizer: Tokenizer, folder: Path) -> None:
        super().__init__()
        self.recipe, self.model, self.folder = recipe, model, folder
        self.boundary = tokenizer.boundary
        self._sizes = torch.tensor([len(piece) for piece in tokenizer.token_bytes()])
        self._sums = torch.zeros(3, dtype=torch.float64)  # nats, tokens, bytes since the last optimiser step
        self._norms: dict[str, float] = {}
        self.last: dict[str, float] = {}

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Dropout and the like are a function of (seed, step, rank), so there is no generator state to restore.
        torch.manual_seed(((self.recipe.seed * 1_000_003 + batch_idx) * 4096 + self.global_rank) % 2**63)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Mean cross-entropy in nats per token."""
        inputs, targets = batch
        logits, _ = self.model(inputs, segments=segments_of(inputs, self.boundary))
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        size = self._sizes[targets.cpu()].sum()
        self._sums += torch.tensor([loss.item() * targets.numel(), targets.numel(), size], dtype=torch.float64)
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Collect the step's numbers and raise `Diverged` before bad ones reach the weights."""
        sums, self._sums = self._sums, torch.zeros(3, dtype=torch.float64)
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(sums)
        nats, tokens, size = sums.tolist()
        named = [(name, p.grad) for name, p in self.model.named_parameters() if p.grad is not None]
        norms = torch.stack(torch._foreach_norm([grad for _, grad in named])).float()
        total = float(norms.norm())
        if not math.isfinite(total) or not math.isfinite(nats):
            raise Diverged(self._explain([name for name, _ in named], norms, nats / tokens))
        self._norms = dict(zip((name for name, _ in named), norms.tolist(), strict=True))
        self.last = {
            "loss": nats / tokens,
            "bits_per_byte": nats / math.log(2) / size if size else math.nan,
            "learning_rate": optimizer.param_groups[0]["lr"],
            "gradient_norm": total,
        }

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        """The optimiser's step, and then what mixers bound."""
        super().optimizer_step(*arguments, **options)
        constrain_(self.model)

    def configure_optimizers(self) -> Any:
        """AdamW, without decay on norms, biases, gates and decays; the schedule moves every step."""
        t = self.recipe.training
        groups = weight_decay_groups(self.model, t.weight_decay)
        fused = all(p.device.type in ("cpu", "cuda") for p in self.model.parameters())
        optimizer = torch.optim.AdamW(groups, lr=t.learning_rate, betas=t.betas, eps=1e-8, fused=fused)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: factor(
                step, kind=t.schedule, steps=t.steps, warmup=t.warmup, decay=t.decay, minimum=t.minimum
            ),
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _explain(self, names: list[str], norms: Tensor, loss: float) -> str:
        bad = sum(not math.isfinite(norm) for norm in norms.tolist())
        order = norms.nan_to_num(math.inf).argsort(descending=True, stable=True).tolist()
        shown = ", ".join(f"{names[i]} {norms[i]:.3g}" for i in order[:3])
        before = sorted(((norm, name) for name, norm in self._norms.items()), reverse=True)[:3]
        text = (
            f"training diverged at step {self.trainer.global_step + 1}: the loss is {loss:.4g}, {bad} of {len(names)} "
            f"gradients are not finite, the largest norms are {shown}"
        )
        if before:
            text += "; one step before they were " + ", ".join(f"{name} {norm:.3g}" for norm, name in before)
        saved = checkpoints(self.folder)
        last = f"the last good checkpoint is {saved[0]}" if saved else "there is no checkpoint yet"
        return f"{text}; {last}; try a lower learning rate, a longer warm-up or a smaller clip"
