"""Hugging Face transformers: functions, layers and whole models with random weights; nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
from adapter import adapts, fill
from peer_mambapy import translate as translate_mamba
from transformers import (
    DynamicCache,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    RecurrentGemmaConfig,
)
from transformers.models.kimi_linear.modeling_kimi_linear import chunk_kimi_delta_attention
from transformers.models.mamba.modeling_mamba import MambaMixer, mamba_selective_scan
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer, mamba2_chunk_scan
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet, torch_chunk_gated_delta_rule
from transformers.models.recurrent_gemma.modeling_recurrent_gemma import (
    RecurrentGemmaRecurrentBlock,
    RecurrentGemmaRglru,
)


# -- functions ---------------------------------------------------------------------------------------------------------
@adapts("op/delta_rule/head", "transformers torch_chunk_gated_delta_rule")
def gated_delta_rule(q: Any, k: Any, v: Any, beta: Any, log_decay: Any) -> Any:
    return torch_chunk_gated_delta_rule(q, k, v, log_decay, beta)[0]


@adapts("op/delta_rule/key", "transformers chunk_kimi_delta_attention")
def kimi_delta_attention(q: Any, k: Any, v: Any, beta: Any, log_decay: Any) -> Any:
    return chunk_kimi_delta_attention(q, k, v, log_decay, beta)[0]


def _chunk_scan(chunk: int) -> None:
    @adapts("op/ssd", f"transformers mamba2_chunk_scan, chunk {chunk}")
    def ssd(x: Any, dt: Any, a: Any, b: Any, c: Any) -> Any:
        return mamba2_chunk_scan(x, dt, a, b, c, chunk_size=chunk)


_chunk_scan(256)  # the default
_chunk_scan(64)


def _selective(name: str, note: str = "", **options: bool) -> None:
    @adapts("op/selective_scan", f"transformers mamba_selective_scan, {name}", note)
    def selective_scan(u: Any, dt: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
        u, dt, b, c = (x.transpose(1, 2) for x in (u, dt, b, c))
        return mamba_selective_scan(u, dt, a, b, c, d, **options).transpose(1, 2)


_selective("default", "loop")
_selective("use_mambapy", use_mambapy=True)


@adapts("op/scan", "transformers RecurrentGemmaRglru", "loop")
def rg_lru_scan(a: Any, b: Any) -> Any:
    nowhere = torch.zeros(a.shape[0], a.shape[1], 1, dtype=torch.bool)
    return RecurrentGemmaRglru._rnn_scan(None, b, a, nowhere, None)[0]


# -- layers ------------------------------------------------------------------------------------------------------------
def _mamba(options: dict[str, Any], **given: Any) -> MambaConfig:
    layers = options.get("layers", 1)
    sizes = {"hidden_size": options["dim"], "num_hidden_layers": layers, "vocab_size": options.get("vocab", 8)}
    return MambaConfig(**sizes, state_size=16, expand=2, residual_in_fp32=False, **given)


def _mamba_layer(name: str, note: str = "", **given: bool) -> None:
    @adapts("layer/mamba", f"transformers MambaMixer, {name}", note)
    def layer(options: dict[str, Any], weights: dict[str, Any]) -> Any:
        module = MambaMixer(_mamba(options, **given), 0)
        fill(module, translate_mamba(weights))
        return module, lambda x: module(x), translate_mamba


_mamba_layer("default", "loop")
_mamba_layer("use_mambapy", use_mambapy=True)


def _mamba2(options: dict[str, Any]) -> Mamba2Config:
    layers, dim = options.get("layers", 1), options["dim"]
    return Mamba2Config(
        hidden_size=dim,
        num_heads=2 * dim // 64,
        head_dim=64,
        state_size=128,
        n_groups=1,
        num_hidden_layers=layers,
        vocab_size=options.get("vocab", 8),
        tie_word_embeddings=True,
        residual_in_fp32=False,
    )


def translate_mamba2(weights: dict[str, Any]) -> dict[str, Any]:
    return {
        "in_proj.weight": weights["in_proj.weight"],
        "conv1d.weight": weights["convolution.weight"].unsqueeze(1),
        "conv1d.bias": weights["convolution.bias"],
        "dt_bias": weights["dt_bias"],
        "A_log": weights["log_a"],
        "D": weights["d"],
        "norm.weight": weights["norm_weight"],
        "out_proj.weight": weights["o_proj.weight"],
    }


@adapts("layer/mamba2", "transformers Mamba2Mixer")
def mamba2_layer(options: dict[str, Any], weights: dict[str, Any]) -> Any:
    module = Mamba2Mixer(_mamba2(options), 0)
    fill(module, translate_mamba2(weights))
    return module, lambda x: module(x), translate_mamba2


def _qwen(options: dict[str, Any]) -> Qwen3NextConfig:
    layers, dim = options.get("layers", 1), options["dim"]
    return Qwen3NextConfig(
        hidden_size=dim,
        intermediate_size=options.get("hidden", dim),
        num_hidden_layers=layers,
        layer_types=["linear_attention"] * layers,
        mlp_only_layers=list(range(layers)),
        linear_num_key_heads=dim // 64,
        linear_num_value_heads=dim // 32,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=dim // 4,
        vocab_size=options.get("vocab", 8),
        tie_word_embeddings=True,
        num_experts=0,
    )


def translate_gated_deltanet(weights: dict[str, Any]) -> dict[str, Any]:
    """Qwen3-Next keeps the rows of q, k, v and the gate together by key head, and so those of beta and the decay."""
    values, dim = weights["gate_proj.weight"].shape
    keys = (weights["qkv_proj.weight"].shape[0] - values) // 2
    heads = keys // 64
    parts = [*weights["qkv_proj.weight"].split([keys, keys, values]), weights["gate_proj.weight"]]
    rates = [weights["beta_proj.weight"], weights["decay_proj.weight"]]
    return {
        "in_proj_qkvz.weight": torch.cat([part.view(heads, -1, dim) for part in parts], 1).flatten(0, 1),
        "in_proj_ba.weight": torch.cat([part.view(heads, -1, dim) for part in rates], 1).flatten(0, 1),
        "conv1d.weight": weights["convolution.weight"].unsqueeze(1),
        "dt_bias": weights["dt_bias"],
        "A_log": weights["log_a"],
        "norm.weight": weights["norm.weight"],
        "out_proj.weight": weights["o_proj.weight"],
    }


@adapts("layer/gated-deltanet", "transformers Qwen3NextGatedDeltaNet")
def gated_deltanet_layer(options: dict[str, Any], weights: dict[str, Any]) -> Any:
    module = Qwen3NextGatedDeltaNet(_qwen(options), 0)
    fill(module, translate_gated_deltanet(weights))
    return module, lambda x: module(x), translate_gated_deltanet


def translate_rg_lru(weights: dict[str, Any]) -> dict[str, Any]:
    x_weight, y_weight = weights["xy_proj.weight"].chunk(2)
    x_bias, y_bias = weights["xy_proj.bias"].chunk(2)
    recurrent_weight, input_weight = weights["gate_weight"].chunk(2, -1)
    recurrent_bias, input_bias = weights["gate_bias"].chunk(2, -1)
    return {
        "linear_x.weight": x_weight,
        "linear_x.bias": x_bias,
        "linear_y.weight": y_weight,
        "linear_y.bias": y_bias,
        "linear_out.weight": weights["o_proj.weight"],
        "linear_out.bias": weights["o_proj.bias"],
        "conv_1d.weight": weights["convolution.weight"].unsqueeze(1),
        "conv_1d.bias": weights["convolution.bias"],
        "rg_lru.recurrent_gate_weight": recurrent_weight,
        "rg_lru.recurrent_gate_bias": recurrent_bias,
        "rg_lru.input_gate_weight": input_weight,
        "rg_lru.input_gate_bias": input_bias,
        "rg_lru.recurrent_param": weights["a_param"],
    }


def _griffin(options: dict[str, Any], weights: dict[str, Any]) -> RecurrentGemmaRecurrentBlock:
    dim = options["dim"]
    config = RecurrentGemmaConfig(hidden_size=dim, lru_width=dim, num_attention_heads=4, num_hidden_layers=1)
    module = RecurrentGemmaRecurrentBlock(config, 0)
    fill(module, translate_rg_lru(weights))
    return module


@adapts("layer/rg-lru", "transformers RecurrentGemmaRecurrentBlock", "loop")
def rg_lru_layer(options: dict[str, Any], weights: dict[str, Any]) -> Any:
    module = _griffin(options, weights)

    def call(x: Any) -> Any:
        positions = torch.arange(x.shape[1]).expand(x.shape[:2])
        return module(x, position_ids=positions, attention_mask=None, use_cache=False)[0]

    return module, call, translate_rg_lru


@adapts("decode/rg-lru", "transformers RecurrentGemmaRecurrentBlock")
def rg_lru_step(options: dict[str, Any], weights: dict[str, Any]) -> Any:
    module = _griffin(options, weights).eval()
    module._setup_cache(1, torch.device("cpu"), torch.float32)
    seen = 0

    def step(token: Any) -> Any:
        nonlocal seen
        y = module(token[:, None], position_ids=torch.tensor([[seen]]), attention_mask=None, use_cache=True)[0]
        seen += 1
        return y[:, 0]

    return step


# -- models, one token at a time ---------------------------------------------------------------------------------------
def _stack(weights: dict[str, Any], layers: int) -> list[dict[str, Any]]:
    """The weights of every block of a tidegate.models.LanguageModel."""
    found = []
    for index in range(layers):
        prefix = f"blocks.{index}."
        found.append({name.removeprefix(prefix): x for name, x in weights.items() if name.startswith(prefix)})
    return found


def _below(prefix: str, tensors: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}


def _steps(model: Any, cache_name: str, **given: Any) -> Any:
    """A step of a causal model that keeps its cache, as `generate` does."""
    model.eval()
    cache = DynamicCache(config=model.config)

    def step(token: Any) -> Any:
        output = model(input_ids=token[:, None], use_cache=True, **{cache_name: cache}, **given)
        return output.logits[:, 0]

    return step


def _mamba_model(kind: Any, config: Any, translate: Any, options: dict[str, Any], weights: dict[str, Any]) -> Any:
    model = kind(config)
    own = {"backbone.embeddings.weight": weights["embedding.weight"], "backbone.norm_f.weight": weights["norm.weight"]}
    for index, block in enumerate(_stack(weights, options["layers"])):
        own[f"backbone.layers.{index}.norm.weight"] = block["mixer_norm.weight"]
        mixer = translate(_below("mixer.", block))
        own |= {f"backbone.layers.{index}.mixer.{name}": x for name, x in mixer.items()}
    model.tie_weights()
    fill(model, own)
    return _steps(model, "cache_params")


@adapts("decode/model/mamba", "transformers MambaForCausalLM")
def mamba_model(options: dict[str, Any], weights: dict[str, Any]) -> Any:
    config = _mamba(options, tie_word_embeddings=True)
    return _mamba_model(MambaForCausalLM, config, translate_mamba, options, weights)


@adapts("decode/model/mamba2", "transformers Mamba2ForCausalLM")
def mamba2_model(options: dict[str, Any], weights: dict[str, Any]) -> Any:
    return _mamba_model(Mamba2ForCausalLM, _mamba2(options), translate_mamba2, options, weights)


@adapts("decode/model/gated-deltanet", "transformers Qwen3NextForCausalLM")
def qwen_model(options: dict[str, Any], weights: dict[str, Any]) -> Any:
    hidden = weights["blocks.0.feed_forward.down.weight"].shape[1]
    model = Qwen3NextForCausalLM(_qwen(options | {"hidden": hidden}))
    own = {"model.embed_tokens.weight": weights["embedding.weight"], "model.norm.weight": weights["norm.weight"] - 1}
    for index, block in enumerate(_stack(weights, options["layers"])):
        at = f"model.layers.{index}."
        own[f"{at}input_layernorm.weight"] = block["mixer_norm.weight"] - 1  # it multiplies by 1 + weight
        own[f"{at}post_attention_layernorm.weight"] = block["feed_forward_norm.weight"] - 1
        gate, up = block["feed_forward.gate_and_up.weight"].chunk(2)
        own |= {f"{at}mlp.gate_proj.weight": gate, f"{at}mlp.up_proj.weight": up}
        own[f"{at}mlp.down_proj.weight"] = block["feed_forward.down.weight"]
        mixer = translate_gated_deltanet(_below("mixer.", block))
        own |= {f"{at}linear_attn.{name}": x for name, x in mixer.items()}
    model.tie_weights()
    fill(model, own)
    # A cache without an attention layer does not know its length, so positions and masks, which no layer here reads,
    # are handed over ready-made: that spares the peer some work.
    ready = {"position_ids": torch.zeros(1, 1, dtype=torch.long), "attention_mask": {"linear_attention": None}}
    return _steps(model, "past_key_values", **ready)
