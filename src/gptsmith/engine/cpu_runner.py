"""Runs small batches on a CPU as one compiled program, since calling PyTorch's operators takes as long as computing.

Supports all families but those with latent attention, in float32 or quantized, with adapters of single sequences. All
else (other activations, odd widths, many tokens at once) goes through `Transformer.forward`, which computes the same.

Axis letters: N new tokens · E query width (all heads) · F intermediate width · R width of queries, keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gptsmith.engine.image_features import place
from gptsmith.engine.runner import Runner, StepInputs
from gptsmith.kernels.threads import announce_compiling, kernels_available, run_in_threads
from gptsmith.model.cache import PagedCache
from gptsmith.model.lora import Adapter, lora_layers
from gptsmith.model.moe import MixtureOfExperts
from gptsmith.model.quantized import QuantizedLinear, QuantizedMatrix, bits_of
from gptsmith.model.transformer import MLP, HeadsNorm, RMSNorm, Transformer

_ACTIVATIONS = {"swiglu": 0, "gelu_tanh": 1, "gelu": 2, "gated_gelu_tanh": 3, "relu": 4, "clamped_swiglu": 5}
_POSITIONS = {"pre": 0, "post": 1, "reordered": 2, "sandwich": 3}
_SCOPES = {"head": 0, "heads": 1, "all": 2}
_ADAPTED = (".attention.qkv_proj", ".attention.o_proj", ".mlp.up_proj", ".mlp.down_proj")
"""The matrices of a layer that the program applies adapters to, in the order of its table."""
MIN_PARAMETERS = 20_000_000  # float32 models below this are fast enough, and compiling takes seconds
MAX_TOKENS = 64  # of a float32 model in one step: beyond it PyTorch's own matrix products are faster


def unsupported(model: Transformer) -> str | None:
    """Return why the compiled program cannot run this model; None: it can, on a CPU that has its instructions."""
    c = model.config
    weight: Any = model.lm_head.weight
    if isinstance(weight, Tensor) and weight.dtype != torch.float32:
        return f"weights in {str(weight.dtype).removeprefix('torch.')}"
    if c.kv_lora_rank is not None:
        return "latent attention"
    if c.mlp not in _ACTIVATIONS:
        return f"the activation {c.mlp}"
    if c.router_scoring != "softmax" or c.n_group > 1 or c.routed_scaling_factor != 1:
        return "routers other than softmax"
    if c.first_k_dense_replace:
        return "dense layers before those with experts"
    if c.shared_expert_intermediate_size and not c.shared_expert_gate:
        return "a shared expert without a gate"
    if c.qk_norm and c.norm == "layernorm" and c.qk_norm_scope != "heads":
        return "LayerNorm of queries and keys"
    if c.embedding_size is not None and c.embedding_size % 32:
        return "embeddings whose width is not a multiple of 32"
    if c.head_dim % 16:
        return f"heads of width {c.head_dim}, which is not a multiple of 16"
    widths = (c.hidden_size, c.num_attention_heads * c.head_dim, c.intermediate_size)
    if any(width % 32 for width in (*widths, c.shared_expert_intermediate_size)):
        return "widths that are not multiples of 32"
    if lora_layers(model):  # which it would not see
        return "an adapter on the model itself"
    if not all(isinstance(layer.mlp, MLP | MixtureOfExperts) for layer in model.layers):
        return "feed-forward layers of another class"
    return None


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
        self._updates_for: tuple[int, ...] | None = None
        self.max_tokens = MAX_TOKENS if bits_of(model) is None else 1 << 30
        self._arrays: tuple[np.ndarray, ...] = ()
        self._arrays_for = (0, 0)  # tokens, threads

    def _logits(self, inputs: StepInputs) -> Tensor:
        ids, chunks, rows, adapted = inputs.ids, inputs.chunks, inputs.rows, inputs.adapted
        if len(ids) > self.max_tokens or not all(self._can_adapt(adapter) for adapter, _ in adapted):
            return super()._logits(inputs)
        from gptsmith.kernels import cpu_decode as kernels

        self._update_addresses()
        c, N = self.model.config, len(ids)
        positions = np.array(
            [p for chunk in chunks for p in range(chunk.past, chunk.past + chunk.size)], dtype=np.int64
        )
        x = self.model.embed(torch.tensor(ids))
        if inputs.features:
            x = place(x, inputs.features)
        cos = sin = np.zeros((2, 0, 0), dtype=np.float32)
        if c.position == "learned":
            x = x + self.model.embed_positions.weight[torch.from_numpy(positions) + c.position_offset]
        else:
            cos, sin = (np.ascontiguousarray(table[:, positions]) for table in (self._cos, self._sin))
        longest = max(len(table) for chunk in chunks for table in chunk.tables)
        tables = np.zeros((len(self.cache.windows), N, longest), dtype=np.int64)
        n, units = 0, []
        for chunk in chunks:
            units += [(n + i, min(4, chunk.size - i)) for i in range(0, chunk.size, 4)]
            for g, table in enumerate(chunk.tables):
                tables[g, n : n + chunk.size, : len(table)] = table
            n += chunk.size
        routes = np.full(N, -1, dtype=np.int64)
        for number, (_, tokens) in enumerate(adapted):
            routes[tokens] = number
        projected = c.embedding_size is not None  # the output matrix then follows in PyTorch
        width = c.hidden_size if projected else -(-c.vocab_size // kernels.ROWS) * kernels.ROWS
        logits = np.empty((len(rows), width), dtype=np.float32)
        run_in_threads(
            kernels.forward,
            *(self._layers, self._head, self._options, self._numbers, self._scales, positions),
            *(np.array(units, dtype=np.int64), cos, sin, tables, self._pools, self.cache.block_size),
            *(np.array(rows, dtype=np.int64), routes, self._updates([adapter for adapter, _ in adapted])),
            x.detach().numpy(),
            *self._work_arrays(N),
            logits,
        )
        if projected:
            with self._evaluating():
                hidden = self.model.embedding_out_proj(torch.from_numpy(logits))
                outputs: Tensor = self.model.lm_head(hidden)
            return outputs[:, : self.vocab_size]
        return torch.from_numpy(logits)[:, : self.vocab_size]

    def _can_adapt(self, adapter: Adapter) -> bool:
        """Return whether the program applies all updates of an adapter: those of attention and dense layers."""
        return all(name.partition(".")[0] == "layers" and name.endswith(_ADAPTED) for name in adapter.updates)

    def _updates(self, adapters: Sequence[Adapter]) -> np.ndarray:
        """Return the table of the adapters' updates, as `kernels.cpu_decode.forward` reads it."""
        from gptsmith.kernels import cpu_decode as k

        key = tuple(id(adapter) for adapter in adapters)
        if self._updates_for != key:
            layers = self.model.config.num_hidden_layers
            parts = max([len(each) for adapter in adapters for each in adapter.updates.values()], default=1)
            table = np.zeros((layers, len(adapters), len(_ADAPTED), parts, k.UPDATE_COLUMNS), dtype=np.int64)
            self._keep_updates: list[Any] = list(adapters)
            for number, adapter in enumerate(adapters):
                for name, updates in adapter.updates.items():
                    kind = next(i for i, ending in enumerate(_ADAPTED) if name.endswith(ending))
                    for i, update in enumerate(updates):
                        tensors = [
                            None if t is None else t.detach().float().contiguous()
                            for t in (update.A, update.B, update.gain, update.bias)
                        ]
                        self._keep_updates += tensors
                        addresses = [0 if t is None else t.data_ptr() for t in tensors]
                        row = [update.first, len(update.B), len(update.A), *addresses]
                        table[int(name.split(".")[1]), number, kind, i] = row
            self._updates_table, self._updates_for = table, key
        return self._updates_table

    def _work_arrays(self, N: int) -> tuple[np.ndarray, ...]:
        """Return the work arrays of `kernels.cpu_decode.forward` for N tokens; they are reused by later calls."""
        c, threads = self.model.config, torch.get_num_threads()
        E, F = c.num_attention_heads * c.head_dim, c.intermediate_size
        R = E + 2 * c.num_key_value_heads * c.head_dim
        widest = -(-max(2 * F if c.gated_mlp else F, c.hidden_size) // 16) * 16
        experts = c.num_experts + bool(c.shared_expert_intermediate_size)
        k = (c.num_experts_per_tok + bool(c.shared_expert_intermediate_size)) if experts else 0
        if self._arrays_for[0] < N or self._arrays_for[1] != threads:
            self._arrays_for = capacity, threads = 1 << (N - 1).bit_length(), threads
            columns = capacity * max(c.hidden_size, E, F)
            inner, pairs = max(F, c.shared_expert_intermediate_size), capacity * k
            rounded = pairs * max(c.hidden_size, inner)
            self._arrays = (
                np.empty((threads, columns), np.float32),
                np.empty((threads, 2 * columns), np.int8),
                np.empty((threads, columns // 32), np.float32),
                np.empty((threads, columns // 32), np.float32),
                *(np.empty((capacity, width), np.float32) for width in (R, E, F, widest)),
                np.empty((threads, 4, self.context + 2 * self.cache.block_size), np.float32),
                np.empty((capacity if c.parallel_residual else 0, c.hidden_size), np.float32),
                np.empty((capacity, -(-c.num_experts // 16) * 16), np.float32),
                np.empty((capacity, k), np.int64),
                np.empty((capacity, k), np.float32),
                np.empty((threads, pairs), np.int64),
                np.empty((threads, experts + 1), np.int64),
                np.empty((pairs, c.hidden_size), np.float32),
                np.empty(2 * rounded, np.int8),
                *(np.empty(rounded // 32, np.float32) for _ in range(2)),
                np.empty((pairs, 2 * inner), np.float32),
                np.empty(pairs * inner, np.float32),
            )
        h, xq, xs, xsum, qkv, mixed, wide, product, scores, *others = self._arrays
        return h, xq, xs, xsum, qkv[:N], mixed[:N], wide[:N], product[:N], scores, *others

    def _update_addresses(self) -> None:
        """Look up the addresses of all weights if the model's tensors have been replaced (by `Module.to`, for example).
        Changes in place need no new addresses."""
        from gptsmith.kernels import cpu_decode as k

        blocks: Any = self.model.layers
        ends = (self.model.lm_head, blocks[0].attention.qkv_proj, blocks[0].mlp, blocks[-1].mlp)
        weights_key = tuple(next(t.data_ptr() for t in (*m.parameters(), *m.buffers())) for m in ends)
        if weights_key == self._weights_key:
            return
        c, cache = self.model.config, self.cache
        self._keep: list[Tensor | np.ndarray] = []
        layers = np.zeros((c.num_hidden_layers, k.COLUMNS), dtype=np.int64)
        after = c.norm_position in ("post", "reordered")  # their norms come after attention and feed-forward layer
        for i, layer in enumerate(blocks):
            attention, mlp, row = layer.attention, layer.mlp, layers[i]
            first = (k.A_OUT_NORM, k.M_OUT_NORM) if after else (k.A_NORM, k.M_NORM)
            mlp_norm = layer.attention_norm if c.shared_norm else layer.mlp_norm
            norms = [(first[0], layer.attention_norm), (first[1], mlp_norm)]
            if c.norm_position == "sandwich":
                norms += [(k.A_OUT_NORM, layer.attention_output_norm), (k.M_OUT_NORM, layer.mlp_output_norm)]
            for at, norm in norms:
                row[at], row[at + 1] = self._norm(norm)
            row[k.Q_NORM], row[k.K_NORM] = self._norm(attention.q_norm)[0], self._norm(attention.k_norm)[0]
            matrices = [(k.QKV, k.QKV_BIAS, attention.qkv_proj), (k.OUT, k.OUT_BIAS, attention.o_proj)]
            if isinstance(mlp, MixtureOfExperts):
                row[k.ROUTER], row[k.ROUTER_BIAS] = self._address(mlp.router.weight), self._address(mlp.router.bias)
                row[k.EXPERTS] = self._experts(mlp)
                if mlp.shared and mlp.shared_gate is not None:
                    row[k.SHARED_GATE] = self._address(mlp.shared_gate.weight)
            else:
                matrices += [(k.UP, k.UP_BIAS, mlp.up_proj), (k.DOWN, k.DOWN_BIAS, mlp.down_proj)]
            for at, bias, module in matrices:
                row[at : at + 4] = self._matrix(module)
                row[bias] = self._address(module.bias)
            row[k.KEYS], row[k.VALUES] = cache.keys[i].data_ptr(), cache.values[i].data_ptr()
            row[k.WINDOW], row[k.TABLES] = c.window_of(i) or 0, cache.group_of[i]
            row[k.ROPE] = ("none", "global", "local").index(c.rope_of(i))
            row[k.SINKS] = self._address(attention.sinks)
        self._layers = layers
        self._scales = np.array([c.scale_of(i) or c.head_dim**-0.5 for i in range(len(layers))], dtype=np.float32)
        if c.embedding_size is None:
            self._head = np.array([*self._norm(self.model.norm), *self._matrix(self.model.lm_head)], dtype=np.int64)
        else:  # a matrix that changes nothing
            identity = self._address(torch.eye(c.hidden_size))
            self._head = np.array([*self._norm(self.model.norm), 32, identity, 0, 0], dtype=np.int64)
        self._options = np.zeros(13, dtype=np.int64)
        for at, value in (
            (k.HEADS, c.num_attention_heads),
            (k.KV_HEADS, c.num_key_value_heads),
            (k.HEAD_DIM, c.head_dim),
            (k.INTERMEDIATE, c.intermediate_size),
            (k.VOCABULARY, c.vocab_size if c.embedding_size is None else c.hidden_size),
            (k.CENTERED, c.norm == "layernorm"),
            (k.POSITION, _POSITIONS[c.norm_position]),
            (k.PARALLEL, c.parallel_residual),
            (k.ACTIVATION, _ACTIVATIONS[c.mlp]),
            (k.QK_SCOPE, _SCOPES[c.qk_norm_scope]),
            (k.ROTARY, c.rotary_dim),
            (k.TOP_K, c.num_experts_per_tok),
            (k.NORMALIZE, c.norm_topk_prob),
        ):
            self._options[at] = value
        numbers = (c.norm_eps, float(c.zero_centered_norm), c.swiglu_alpha, c.swiglu_limit)
        self._numbers = np.array(numbers, dtype=np.float32)
        sizes = {cache.group_of[i]: len(cache.keys[i]) for i in range(c.num_hidden_layers)}
        self._pools = np.array([sizes[g] for g in range(len(cache.windows))], dtype=np.int64)
        if c.position == "rope":
            m = self.model
            local = (m.local_rope_cos, m.local_rope_sin) if c.local_rope_theta is not None else (m.rope_cos, m.rope_sin)
            self._cos, self._sin = (
                torch.stack(pair).numpy() for pair in ((m.rope_cos, local[0]), (m.rope_sin, local[1]))
            )
        self._weights_key = weights_key

    def _experts(self, mlp: MixtureOfExperts) -> int:
        """Return the address of a layer's table of experts; the shared expert is the last."""
        from gptsmith.kernels import cpu_decode as k

        table = np.zeros((mlp.experts + bool(mlp.shared), k.EXPERT_COLUMNS), dtype=np.int64)
        for at, name in ((k.X_UP, "up_proj"), (k.X_DOWN, "down_proj")):
            stack: Any = getattr(mlp, name)
            for expert, matrix in enumerate(stack):
                table[expert, at : at + 4] = self._weight(matrix)
        for at, biases in zip((k.X_UP_BIAS, k.X_DOWN_BIAS), mlp.biases(), strict=True):
            for expert, bias in enumerate(biases):
                table[expert, at] = self._address(bias)
        table[:, k.X_WIDTH] = self.model.config.intermediate_size
        if mlp.shared:
            table[-1, k.X_UP : k.X_UP + 4] = self._matrix(mlp.shared_up_proj)
            table[-1, k.X_DOWN : k.X_DOWN + 4] = self._matrix(mlp.shared_down_proj)
            table[-1, k.X_WIDTH] = mlp.shared
        self._keep.append(table)
        address: int = table.ctypes.data
        return address

    def _address(self, tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        contiguous = tensor.detach().contiguous()
        self._keep.append(contiguous)  # alive as long as its address is used
        return contiguous.data_ptr()

    def _norm(self, norm: nn.Module) -> tuple[int, int]:
        if isinstance(norm, RMSNorm | HeadsNorm):
            return self._address(norm.weight), 0
        if isinstance(norm, nn.LayerNorm):
            return self._address(norm.weight), self._address(norm.bias)
        return 0, 0

    def _matrix(self, module: nn.Module) -> tuple[int, int, int, int]:
        """Return (bits, address of the weights, of the scales, of the zero points) of a layer's weight."""
        assert isinstance(module, nn.Linear | QuantizedLinear)
        return self._weight(module.weight)

    def _weight(self, weight: Tensor | QuantizedMatrix) -> tuple[int, int, int, int]:
        if isinstance(weight, Tensor):
            return 32, self._address(weight), 0, 0
        zero_points = weight.zero_points if weight.bits < 8 else None
        return weight.bits, self._address(weight.packed), self._address(weight.scales), self._address(zero_points)
