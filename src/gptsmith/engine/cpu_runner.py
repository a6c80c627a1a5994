"""Runs small batches on a CPU as one compiled program, since calling PyTorch's operators takes as long as computing.

Supports dense pre-norm models with SwiGLU or GELU in float32 or 4 to 8 bits, with any position scheme and window. All
else (experts, post-norm, other activations, adapters, many tokens at once) goes through `Transformer.forward`, which
computes the same.

Axis letters: N new tokens · E query width (all heads) · F intermediate width · R width of queries, keys and values.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gptsmith.engine.image_features import place
from gptsmith.engine.runner import Runner
from gptsmith.kernels.threads import announce_compiling, kernels_available, run_in_threads
from gptsmith.model.cache import Chunk, PagedCache
from gptsmith.model.lora import lora_layers
from gptsmith.model.quantized import QuantizedLinear, QuantizedMatrix, bits_of
from gptsmith.model.transformer import MLP, RMSNorm, Transformer

_ACTIVATIONS = {"swiglu": 0, "gelu_tanh": 1, "gelu": 2}
MIN_PARAMETERS = 20_000_000  # float32 models below this are fast enough, and compiling takes seconds
MAX_TOKENS = 64  # of a float32 model in one step: beyond it PyTorch's own matrix products are faster


def unsupported(model: Transformer) -> str | None:
    """Return what of this model the compiled program does not compute; None: nothing."""
    c = model.config
    weight: Any = model.lm_head.weight
    widths = (c.hidden_size, c.num_attention_heads * c.head_dim, c.intermediate_size)
    found = {
        "weights other than float32": isinstance(weight, Tensor) and weight.dtype != torch.float32,
        "latent attention": c.kv_lora_rank is not None,
        "mixtures of experts": bool(c.num_experts) or not all(isinstance(layer.mlp, MLP) for layer in model.layers),
        "norms after attention and feed-forward layers": c.norm_position != "pre",
        "norms of 1 + weight": c.zero_centered_norm,
        "parallel blocks": c.parallel_residual,
        "norms of all heads together or with their own weights": c.qk_norm and c.qk_norm_scope != "head",
        "LayerNorm of queries and keys": c.qk_norm and c.norm != "rmsnorm",
        "rotary positions over a part of a head": c.position == "rope" and c.rotary_dim != c.head_dim,
        "layers with other rotary positions, or none": bool(c.rope_pattern) or c.local_rope_theta is not None,
        "scaled, projected or shifted embeddings": (
            c.scale_embeddings or c.embedding_size is not None or c.position_offset > 0
        ),
        "attention sinks": c.attention_sinks,
        "scores scaled by the layer": c.scale_attn_by_inverse_layer_idx,
        f"the activation {c.mlp}": c.mlp not in _ACTIVATIONS,
        "an adapter on the model itself": bool(lora_layers(model)),
        "heads whose width is not a multiple of 16": c.head_dim % 16 != 0,
        "widths that are not multiples of 32": any(width % 32 for width in widths),
    }
    return next((what for what, is_so in found.items() if is_so), None)


def is_supported(model: Transformer) -> bool:
    """Return whether the compiled program can run this model on this machine."""
    weight: Any = model.lm_head.weight
    device = weight.device if isinstance(weight, Tensor) else weight.packed.device
    return device.type == "cpu" and unsupported(model) is None and kernels_available()


def worth_compiling(model: Transformer) -> bool:
    """Return whether the compiled program is worth the seconds that compiling takes."""
    return bits_of(model) is not None or sum(p.numel() for p in model.parameters()) >= MIN_PARAMETERS


class CpuRunner(Runner):
    """A `Runner` that computes small batches with `kernels.cpu_decode.forward`."""

    def __init__(self, model: Transformer, cache: PagedCache, vocab_size: int) -> None:
        super().__init__(model, cache, vocab_size)
        announce_compiling()
        self._weights_key: Any = None
        self.max_tokens = MAX_TOKENS if bits_of(model) is None else 1 << 30
        self._arrays: tuple[np.ndarray, ...] = ()
        self._arrays_for = (0, 0)  # tokens, threads

    def _logits(
        self, ids: list[int], chunks: list[Chunk], rows: list[int], features: list[tuple[int, Tensor]]
    ) -> Tensor:
        if len(ids) > self.max_tokens:
            return super()._logits(ids, chunks, rows, features)
        from gptsmith.kernels import cpu_decode as kernels

        self._update_addresses()
        c, N = self.model.config, len(ids)
        positions = np.array(
            [p for chunk in chunks for p in range(chunk.past, chunk.past + chunk.size)], dtype=np.int64
        )
        x = self.model.embed(torch.tensor(ids))
        if features:
            x = place(x, features)
        cos = sin = np.zeros((0, 0), dtype=np.float32)
        if c.position == "learned":
            x = x + self.model.embed_positions.weight[torch.from_numpy(positions)]
        else:
            cos, sin = self._cos[positions], self._sin[positions]
        longest = max(len(table) for chunk in chunks for table in chunk.tables)
        tables = np.zeros((len(self.cache.windows), N, longest), dtype=np.int64)
        n, units = 0, []
        for chunk in chunks:
            units += [(n + i, min(4, chunk.size - i)) for i in range(0, chunk.size, 4)]
            for g, table in enumerate(chunk.tables):
                tables[g, n : n + chunk.size, : len(table)] = table
            n += chunk.size
        logits = np.empty((len(rows), -(-c.vocab_size // kernels.ROWS) * kernels.ROWS), dtype=np.float32)
        run_in_threads(
            kernels.forward,
            *(self._layers, self._head, c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.intermediate_size),
            *(c.vocab_size, c.attention_scale or c.head_dim**-0.5, c.norm_eps, c.norm == "layernorm"),
            *(_ACTIVATIONS[c.mlp], positions, np.array(units, dtype=np.int64), cos, sin, tables),
            *(self._pools, self.cache.block_size, np.array(rows, dtype=np.int64), x.detach().numpy()),
            *self._work_arrays(N),
            logits,
        )
        return torch.from_numpy(logits)[:, : self.vocab_size]

    def _work_arrays(self, N: int) -> tuple[np.ndarray, ...]:
        """Return the work arrays of `kernels.cpu_decode.forward` for N tokens; they are reused by later calls."""
        c, threads = self.model.config, torch.get_num_threads()
        E, F = c.num_attention_heads * c.head_dim, c.intermediate_size
        R = E + 2 * c.num_key_value_heads * c.head_dim
        widest = -(-max(2 * F if c.gated_mlp else F, c.hidden_size) // 16) * 16
        if self._arrays_for[0] < N or self._arrays_for[1] != threads:
            self._arrays_for = capacity, threads = 1 << (N - 1).bit_length(), threads
            columns = capacity * max(c.hidden_size, E, F)
            self._arrays = (
                np.empty((threads, columns), np.float32),
                np.empty((threads, 2 * columns), np.int8),
                np.empty((threads, columns // 32), np.float32),
                np.empty((threads, columns // 32), np.float32),
                *(np.empty((capacity, width), np.float32) for width in (R, E, F, widest)),
                np.empty((threads, 4, self.context + 2 * self.cache.block_size), np.float32),
            )
        h, xq, xs, xsum, qkv, mixed, wide, product, scores = self._arrays
        return h, xq, xs, xsum, qkv[:N], mixed[:N], wide[:N], product[:N], scores

    def _update_addresses(self) -> None:
        """Look up the addresses of all weights if the model's tensors have been replaced (by `Module.to`, for example).
        Changes in place need no new addresses."""
        from gptsmith.kernels import cpu_decode as k

        blocks: Any = self.model.layers
        ends = (self.model.lm_head, blocks[0].attention.qkv_proj, blocks[0].mlp, blocks[-1].mlp.down_proj)
        weights_key = tuple(next(t.data_ptr() for t in (*m.parameters(), *m.buffers())) for m in ends)
        if weights_key == self._weights_key:
            return
        c, cache = self.model.config, self.cache
        self._keep: list[Tensor] = []
        layers = np.zeros((c.num_hidden_layers, k.COLUMNS), dtype=np.int64)
        for i, layer in enumerate(blocks):
            attention, mlp, row = layer.attention, layer.mlp, layers[i]
            row[k.A_NORM], row[k.A_NORM_BIAS] = self._norm(layer.attention_norm)
            row[k.M_NORM], row[k.M_NORM_BIAS] = self._norm(layer.mlp_norm)
            row[k.Q_NORM], row[k.K_NORM] = self._norm(attention.q_norm)[0], self._norm(attention.k_norm)[0]
            for at, bias, module in (
                (k.QKV, k.QKV_BIAS, attention.qkv_proj),
                (k.OUT, k.OUT_BIAS, attention.o_proj),
                (k.UP, k.UP_BIAS, mlp.up_proj),
                (k.DOWN, k.DOWN_BIAS, mlp.down_proj),
            ):
                row[at : at + 4] = self._matrix(module)
                row[bias] = self._address(module.bias)
            row[k.KEYS], row[k.VALUES] = cache.keys[i].data_ptr(), cache.values[i].data_ptr()
            row[k.WINDOW], row[k.TABLES] = c.window_of(i) or 0, cache.group_of[i]
        self._layers = layers
        self._head = np.array([*self._norm(self.model.norm), *self._matrix(self.model.lm_head)], dtype=np.int64)
        sizes = {cache.group_of[i]: len(cache.keys[i]) for i in range(c.num_hidden_layers)}
        self._pools = np.array([sizes[g] for g in range(len(cache.windows))], dtype=np.int64)
        if c.position == "rope":
            self._cos, self._sin = self.model.rope_cos.numpy(), self.model.rope_sin.numpy()
        self._weights_key = weights_key

    def _address(self, tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        contiguous = tensor.detach().contiguous()
        self._keep.append(contiguous)  # alive as long as its address is used
        return contiguous.data_ptr()

    def _norm(self, norm: nn.Module) -> tuple[int, int]:
        if isinstance(norm, RMSNorm):
            return self._address(norm.weight), 0
        if isinstance(norm, nn.LayerNorm):
            return self._address(norm.weight), self._address(norm.bias)
        return 0, 0

    def _matrix(self, module: nn.Module) -> tuple[int, int, int, int]:
        """Return (bits, address of the weights, of the scales, of the zero points)."""
        if isinstance(module, QuantizedLinear):
            packed: QuantizedMatrix = module.weight
            zero_points = packed.zero_points if packed.bits < 8 else None
            return packed.bits, self._address(packed.packed), self._address(packed.scales), self._address(zero_points)
        assert isinstance(module, nn.Linear)
        return 32, self._address(module.weight), 0, 0
