"""Weights in 8 or 4 bits: an eighth to a quarter of the memory, and of the time where memory is what takes time.

    quantize(model, 4)                 # in place; the model computes as before, nearly

A weight is a code times the scale of its group (32 columns of a row), in 4 bits plus the group's least value:
`w = scale · q + least`. Codes lie as `model.kernels` reads them; where it cannot (another processor, no numba), a
matrix is made float32 each time it is used: correct anywhere, and slow.

Axis letters: R rows (outputs) · K columns (inputs) · G groups of a row · N tokens · E experts.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptsmith.errors import CheckpointError, UsageError
from gptsmith.model.moe import MixtureOfExperts
from gptsmith.model.parallel import kernels_available, packed_linear
from gptsmith.model.transformer import Transformer

Bits = Literal[4, 8]
GROUP, ROWS = 32, 16
METHOD = "gptsmith"  # in config.json's quantization_config


def encode(weight: Tensor, bits: Bits) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes (R, K) uint8, scales (R, G) and least values (R, G) float16 (None in 8 bits) of a (R, K) matrix.

    8 bits: symmetric, stored as 128 more than the code is. 4 bits: of a few ways to lay fifteen steps over a group, the
    one with the least squared error.
    """
    groups = weight.float().reshape(len(weight), -1, GROUP)  # (R, G, 32)
    if bits == 8:
        scales = (groups.abs().amax(dim=-1) / 127).half()
        codes = (groups / scales.float().clamp_min(1e-12)[..., None]).round().clamp(-127, 127)
        return (codes + 128).to(torch.uint8).flatten(1), scales, None
    low, high = groups.amin(dim=-1), groups.amax(dim=-1)
    best_error = torch.full_like(low, torch.inf)
    best = [torch.zeros_like(groups), torch.zeros_like(low), torch.zeros_like(low)]
    for inside in (0.0, 0.02, 0.04, 0.06, 0.09, 0.12):  # how far from either end the steps begin
        least = (low + inside * (high - low)).half().float()
        scale = ((high - low) * (1 - 2 * inside) / 15).half().float()
        codes = ((groups - least[..., None]) / scale.clamp_min(1e-12)[..., None]).round().clamp(0, 15)
        error = (codes * scale[..., None] + least[..., None] - groups).square().sum(dim=-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        for kept, new in zip(best, (codes, scale, least), strict=True):
            kept.copy_(torch.where(better if new.dim() == 2 else better[..., None], new, kept))
    codes, scale, least = best
    return codes.to(torch.uint8).flatten(1), scale.half(), least.half()


def pack(codes: Tensor, bits: Bits) -> Tensor:
    """(R, K) codes -> (R / 16, G, 64 · bits) uint8: blocks of sixteen rows (the last filled up), each group's columns
    four at a time for all rows; in 4 bits columns 8j + c in the low half of a byte and 8j + 4 + c in the high half."""
    R, K = codes.shape
    codes = F.pad(codes, (0, 0, 0, -R % ROWS)).view(-1, ROWS, K // GROUP, GROUP // 4, 4).permute(0, 2, 3, 1, 4)
    if bits == 4:
        codes = codes[:, :, ::2] | (codes[:, :, 1::2] << 4)
    return codes.reshape(codes.shape[0], codes.shape[1], -1).contiguous()


def unpack(packed: Tensor, bits: Bits, rows: int) -> Tensor:
    """The inverse of `pack`: (R, K) codes."""
    blocks, G, _ = packed.shape
    codes = packed.view(blocks, G, -1, ROWS, 4)
    if bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), dim=3).flatten(2, 3)
    return codes.permute(0, 3, 1, 2, 4).reshape(blocks * ROWS, G * GROUP)[:rows]


def _by_block(values: Tensor) -> Tensor:
    """(R, G) -> (R / 16, G, 16), the last block filled up."""
    R, G = values.shape
    return F.pad(values, (0, 0, 0, -R % ROWS)).view(-1, ROWS, G).transpose(1, 2).contiguous()


class Packed(nn.Module):
    """A (R, K) matrix of few bits. packed, scales, least: see `pack`; scales and least values by block, float16."""

    packed: Tensor
    scales: Tensor
    least: Tensor

    def __init__(self, rows: int, columns: int, bits: Bits) -> None:
        super().__init__()
        self.rows, self.columns, self.bits = rows, columns, bits
        blocks, G = -(-rows // ROWS), columns // GROUP
        self.register_buffer("packed", torch.zeros(blocks, G, 64 * bits, dtype=torch.uint8))
        self.register_buffer("scales", torch.zeros(blocks, G, ROWS, dtype=torch.float16))
        self.register_buffer("least", torch.zeros(blocks if bits == 4 else 0, G, ROWS, dtype=torch.float16))

    @classmethod
    def of(cls, weight: Tensor, bits: Bits) -> Packed:
        made = cls(weight.shape[0], weight.shape[1], bits)
        codes, scales, least = encode(weight.detach(), bits)
        made.packed, made.scales = pack(codes, bits), _by_block(scales)
        if least is not None:
            made.least = _by_block(least)
        return made

    def matrix(self) -> Tensor:
        """(R, K) float32."""
        return self._values(unpack(self.packed, self.bits, self.rows), slice(None))

    def some_rows(self, index: Tensor) -> Tensor:
        """(len(index), K) float32: these rows alone."""
        blocks = self.packed[index // ROWS]  # (n, G, 64 · bits), of which a row is a sixteenth
        codes = blocks.view(*blocks.shape[:2], -1, ROWS, 4)
        codes = codes[torch.arange(len(index), device=index.device), :, :, index % ROWS]  # (n, G, steps, 4)
        if self.bits == 4:
            codes = torch.stack((codes & 15, codes >> 4), dim=3).flatten(2, 3)
        return self._values(codes.flatten(1), index)

    def _values(self, codes: Tensor, rows: Tensor | slice) -> Tensor:
        scales = self.scales.transpose(1, 2).flatten(0, 1)[: self.rows][rows].float()  # (n, G)
        values: Tensor = codes.float().reshape(len(codes), -1, GROUP)
        if self.bits == 8:
            return ((values - 128) * scales[..., None]).flatten(1)
        least = self.least.transpose(1, 2).flatten(0, 1)[: self.rows][rows].float()
        return (values * scales[..., None] + least[..., None]).flatten(1)

    def multiply(self, x: Tensor) -> Tensor:
        """x (..., K) times the transposed matrix: (..., R)."""
        if x.device.type == "cpu" and x.dtype == torch.float32 and kernels_available():
            return packed_linear(x, self.packed, self.scales, self.least, self.rows, self.bits)
        return F.linear(x, self.matrix().to(x.dtype))


class QuantizedLinear(nn.Module):
    """A `nn.Linear` over a `Packed` matrix."""

    def __init__(self, weight: Packed, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        y = self.weight.multiply(x)
        return y if self.bias is None else y + self.bias


class QuantizedEmbedding(nn.Module):
    """A `nn.Embedding` over a `Packed` matrix, which the output may share."""

    def __init__(self, weight: Packed) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight.some_rows(ids.flatten()).view(*ids.shape, -1)


class QuantizedExperts(MixtureOfExperts):
    """A mixture whose experts are `Packed`; the router stays as it is."""

    up: Any
    down: Any

    def ask_experts(self, runs: tuple[Tensor, ...]) -> list[Tensor]:
        answers = []
        for run, up_proj, down_proj in zip(runs, self.up, self.down, strict=True):
            if len(run):
                gate, up = up_proj.multiply(run).chunk(2, dim=-1)
                answers.append(down_proj.multiply(F.silu(gate) * up))
        return answers


def can_pack(weight: Tensor) -> bool:
    return weight.dim() >= 2 and weight.shape[-1] % GROUP == 0


@torch.no_grad()
def quantize(model: Transformer, bits: Bits, *, fill: bool = True) -> Transformer:
    """Replace the model's matrices by ones of so many bits, in place. Norms, biases, positions and routers stay, and so
    does a matrix whose width is no multiple of 32. Embeddings and the output have 8 bits always: what 4 lose shows most
    there.

    fill: False leaves the numbers undefined, to be loaded. Raises UsageError for another number of bits, or where there
    is nothing to quantize.
    """
    if bits not in (4, 8):
        raise UsageError(f"--bits must be 4 or 8, not {bits}.")

    def packed(weight: Tensor, bits: Bits = bits) -> Packed:
        return Packed.of(weight, bits) if fill else Packed(weight.shape[0], weight.shape[1], bits)

    count = 0
    for module in list(model.modules()):
        if isinstance(module, MixtureOfExperts) and can_pack(module.up_proj) and can_pack(module.down_proj):
            up = nn.ModuleList(packed(w) for w in module.up_proj)
            down = nn.ModuleList(packed(w) for w in module.down_proj)
            del module.up_proj, module.down_proj
            module.__class__ = QuantizedExperts
            module.up, module.down = up, down
            count += 1
        for name, child in list(module.named_children()):
            if (
                isinstance(child, nn.Linear)
                and name not in ("router", "shared_gate", "lm_head")
                and can_pack(child.weight)
            ):
                setattr(module, name, QuantizedLinear(packed(child.weight), child.bias))
                count += 1
    if can_pack(model.lm_head.weight):
        weight = packed(model.lm_head.weight, 8)
        if model.config.tie_word_embeddings:
            model.embed_tokens = QuantizedEmbedding(weight)  # type: ignore[assignment]
        else:
            embedding = model.embed_tokens.weight
            table = packed(embedding, 8)
            model.embed_tokens = QuantizedEmbedding(table)  # type: ignore[assignment]
        model.lm_head = QuantizedLinear(weight, None)  # type: ignore[assignment]
        count += 1
    if not count:
        raise UsageError("this model has no matrix whose width is a multiple of 32: it cannot be quantized.")
    model.quantized_bits = bits  # type: ignore[assignment]
    return model


def is_quantized(model: nn.Module) -> bool:
    return hasattr(model, "quantized_bits")


def description(model: nn.Module) -> dict[str, Any]:
    """A quantized model's `quantization_config` of config.json."""
    return {"quant_method": METHOD, "bits": model.quantized_bits, "group_size": GROUP}


def described_bits(values: Any) -> Bits | None:
    """The bits of a `quantization_config` that `description` wrote; None for any other."""
    if not isinstance(values, dict) or values.get("quant_method") != METHOD or values.get("group_size") != GROUP:
        return None
    bits = values.get("bits")
    return bits if bits in (4, 8) else None


def state(model: Transformer) -> dict[str, Tensor]:
    """What to save of a quantized model: its tensors, shared ones once."""
    seen: set[int] = set()
    tensors = {}
    for name, tensor in model.state_dict().items():
        if tensor.numel() and tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        tensors[name] = tensor.contiguous()
    return tensors


@torch.no_grad()
def load_state(model: Transformer, tensors: Any, where: str) -> None:
    """Fill a quantized model with what `state` gave. CheckpointError for what is missing or does not fit."""
    own = model.state_dict()
    places: dict[int, list[str]] = {}
    for name, tensor in own.items():
        places.setdefault(tensor.data_ptr() if tensor.numel() else -1 - len(places), []).append(name)
    for names in places.values():
        source = next((name for name in names if name in tensors), None)
        if source is None:
            raise CheckpointError(f"{where} lacks the tensor {names[0]}.")
        value, target = tensors[source], own[names[0]]
        if value.shape != target.shape or value.dtype != target.dtype:
            raise CheckpointError(
                f"{where}: {source} is {list(value.shape)} {value.dtype}, expected {list(target.shape)} {target.dtype}."
            )
        target.copy_(value)
