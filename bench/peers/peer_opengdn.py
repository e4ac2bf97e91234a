"""opengdn: the chunkwise gated delta rule. Its layer norms over all heads and takes a sigmoid decay: another layer."""

from __future__ import annotations

from typing import Any

from adapter import adapts
from opengdn import gated_delta_chunkwise


@adapts("op/delta_rule/head", "opengdn gated_delta_chunkwise")
def gated_delta(q: Any, k: Any, v: Any, beta: Any, log_decay: Any) -> Any:
    return gated_delta_chunkwise(q * q.shape[-1] ** -0.5, k, v, log_decay.exp(), beta)[0]
