"""Weights in 8 or 4 bits: an eighth to a quarter of the memory, and of the time where memory is what takes time.

    quantize(model, 4)                 # in place; the model computes as before, nearly
    dequantize(model)                  # a plain model again, of what the few bits say

A weight is a code times the scale of its group (32 columns of a row), in 4 bits plus the group's least value:
`w = scale · q + least`; GGUF's Q4_0, Q4_1 and Q8_0 are the same numbers in another order. Codes lie as `model.kernels`
reads them; where it cannot (another processor, no numba), PyTorch's own kernel for 4 bits multiplies, and a matrix of 8
bits is made float32 each time it is used: correct anywhere, and slow.

Axis letters: R rows (outputs) · K columns (inputs) · G groups of a row · N tokens · E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptsmith.errors import CheckpointError, UsageError
from gptsmith.kernels.threads import kernels_available, packed_linear
from gptsmith.model.moe import MixtureOfExperts
from gptsmith.model.transformer import Transformer

Bits = Literal[4, 8]
GROUP, ROWS = 32, 16
_AT_ONCE = 1 << 22  # numbers that are rounded at once
METHOD = "gptsmith"  # in config.json's quantization_config


@dataclass(frozen=True)
class Codes:
    """A (R, K) matrix in few bits. codes: (R, K) uint8, in 8 bits 128 more than they say; scales: (R, G) float16;
    least: (R, G) float16 in 4 bits, None in 8."""

    bits: Bits
    codes: Tensor
    scales: Tensor
    least: Tensor | None


def joined(parts: Sequence[Codes]) -> Codes:
    """Matrices of as many columns and bits, one under the other."""
    least = [part.least for part in parts if part.least is not None]
    return Codes(
        parts[0].bits,
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scales for part in parts]),
        torch.cat(least) if least else None,
    )


def encode(weight: Tensor, bits: Bits) -> Codes:
    """A (R, K) matrix rounded. 8 bits: symmetric about 0. 4 bits: of a few ways to lay fifteen steps over a group, the
    one with the least squared error."""
    rows = max(1, _AT_ONCE // weight.shape[1])
    return joined([_encode(part, bits) for part in torch.split(weight, rows)])


def _encode(weight: Tensor, bits: Bits) -> Codes:
    groups = weight.float().reshape(len(weight), -1, GROUP)  # (R, G, 32)
    if bits == 8:
        scales = (groups.abs().amax(dim=-1) / 127).half()
        codes = (groups / scales.float().clamp_min(1e-12)[..., None]).round().clamp(-127, 127)
        return Codes(8, (codes + 128).to(torch.uint8).flatten(1), scales, None)
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
    return Codes(4, codes.to(torch.uint8).flatten(1), scale.half(), least.half())


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
        self._for_torch: tuple[Tensor, Tensor, Tensor] | None = None

    @classmethod
    def of(cls, matrix: Codes) -> Packed:
        made = cls(matrix.codes.shape[0], matrix.codes.shape[1], matrix.bits)
        made.packed, made.scales = pack(matrix.codes, matrix.bits), _by_block(matrix.scales)
        if matrix.least is not None:
            made.least = _by_block(matrix.least)
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
        if x.device.type != "cpu" or x.dtype != torch.float32:
            return F.linear(x, self.matrix().to(x.dtype))
        if kernels_available():
            return packed_linear(x, self.packed, self.scales, self.least, self.rows, self.bits)
        if self.bits == 4 and self.rows % ROWS == 0:
            return self._multiply_by_torch(x)
        return F.linear(x, self.matrix())

    def _multiply_by_torch(self, x: Tensor) -> Tensor:
        """By PyTorch's kernel, which holds codes in an order of its own; it counts from the middle of the codes."""
        if self._for_torch is None or self._for_torch[0] is not self.packed:
            codes = unpack(self.packed, 4, self.rows).int()
            scales, least = (s.transpose(1, 2).flatten(0, 1)[: self.rows].float() for s in (self.scales, self.least))
            middles = torch.stack((scales, least + 8 * scales), dim=-1).transpose(0, 1).contiguous()  # (G, R, 2)
            self._for_torch = self.packed, torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1), middles
        _, own, middles = self._for_torch
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x.reshape(-1, self.columns), own, GROUP, middles)
        return y.view(*x.shape[:-1], self.rows)


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

    up_proj: Any
    down_proj: Any

    def ask_experts(self, runs: tuple[Tensor, ...]) -> list[Tensor]:
        answers = []
        for run, up_proj, down_proj in zip(runs, self.up_proj, self.down_proj, strict=True):
            if len(run):
                gate, up = up_proj.multiply(run).chunk(2, dim=-1)
                answers.append(down_proj.multiply(F.silu(gate) * up))
        return answers


def can_pack(weight: Tensor) -> bool:
    return weight.shape[-1] % GROUP == 0


@torch.no_grad()
def replace_matrices(model: Transformer, packed: Callable[[str, Tensor], Packed | None]) -> Transformer:
    """Replace the model's matrices by what `packed` gives for their names and weights, in place; None: it stays.

    Norms, biases, positions, routers and gates stay always, and so does a matrix whose width is no multiple of 32. An
    expert's names are `layers.0.mlp.up_proj.3`; all experts of a layer are replaced, or none.
    """
    for path, module in list(model.named_modules()):
        prefix = f"{path}." if path else ""
        if isinstance(module, MixtureOfExperts) and can_pack(module.up_proj) and can_pack(module.down_proj):
            experts = {
                name: [packed(f"{prefix}{name}.{e}", weight) for e, weight in enumerate(getattr(module, name))]
                for name in ("up_proj", "down_proj")
            }
            if all(each is not None for them in experts.values() for each in them):
                module.__class__ = QuantizedExperts
                for name, them in experts.items():
                    delattr(module, name)
                    setattr(module, name, nn.ModuleList(each for each in them if each is not None))
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and name not in ("router", "shared_gate", "lm_head"):
                made = packed(f"{prefix}{name}.weight", child.weight) if can_pack(child.weight) else None
                if made is not None:
                    setattr(module, name, QuantizedLinear(made, child.bias))
    ends: Any = model
    if can_pack(model.embed_tokens.weight):
        table = packed("embed_tokens.weight", model.embed_tokens.weight)
        tied = model.config.tie_word_embeddings
        head = table if tied else packed("lm_head.weight", model.lm_head.weight)
        if table is not None:
            ends.embed_tokens = QuantizedEmbedding(table)
        if head is not None:
            ends.lm_head = QuantizedLinear(head, None)
    return model


def quantize(model: Transformer, bits: Bits) -> Transformer:
    """Round the model's matrices to so many bits, in place (see `replace_matrices`). Embeddings and the output have 8
    bits always: what 4 lose shows most there.

    Raises UsageError for another number of bits, or where there is nothing to quantize.
    """
    if bits not in (4, 8):
        raise UsageError(f"--bits must be 4 or 8, not {bits}.")

    def packed(name: str, weight: Tensor) -> Packed:
        ends = name in ("lm_head.weight", "embed_tokens.weight")
        return Packed.of(encode(weight.detach(), 8 if ends else bits))

    replace_matrices(model, packed)
    if bits_of(model) is None:
        raise UsageError("this model has no matrix whose width is a multiple of 32: it cannot be quantized.")
    return model


def quantize_on_gpu(model: Transformer, bits: Bits) -> Transformer:
    """Round the linear layers of a bfloat16 model on a GPU through torchao, in place. 4 bits: in groups of 32, by the
    kernel that PyTorch has for them. Embeddings, output and experts stay bfloat16. UsageError without torchao."""
    try:
        from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
    except ImportError:
        raise UsageError("few bits on a GPU need torchao: pip install 'gptsmith[gpu]'; or use --device cpu.") from None
    if bits == 4:
        config = Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format="tile_packed_to_4d")
    else:
        config = Int8WeightOnlyConfig()

    def chosen(module: nn.Module, name: str) -> bool:
        plain = isinstance(module, nn.Linear) and can_pack(module.weight)
        return plain and name.rpartition(".")[2] not in ("router", "shared_gate", "lm_head")

    quantize_(model, config, filter_fn=chosen)
    return model


@torch.no_grad()
def dequantize(model: Transformer) -> Transformer:
    """Make the matrices of few bits float32 again, in place: the same numbers, in plain layers."""
    for module in list(model.modules()):
        if isinstance(module, QuantizedExperts):
            for name in ("up_proj", "down_proj"):
                matrices = torch.stack([each.matrix() for each in getattr(module, name)])
                delattr(module, name)
                setattr(module, name, nn.Parameter(matrices))
            module.__class__ = MixtureOfExperts  # type: ignore[assignment]
        for name, child in list(module.named_children()):
            if isinstance(child, QuantizedLinear):
                with torch.device("meta"):
                    plain = nn.Linear(child.weight.columns, child.weight.rows, bias=False)
                plain.weight, plain.bias = nn.Parameter(child.weight.matrix()), child.bias  # type: ignore[assignment]
                setattr(module, name, plain)
    table: nn.Module = model.embed_tokens
    if isinstance(table, QuantizedEmbedding):
        matrix = table.weight.matrix()
        model.embed_tokens = nn.Embedding(matrix.shape[0], matrix.shape[1], _weight=matrix)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    return model


def bits_of(model: nn.Module) -> Bits | None:
    """The fewest bits of the model's matrices; None for a plain model."""
    found: set[Bits] = {module.bits for module in model.modules() if isinstance(module, Packed)}
    return min(found, default=None)


def description(bits: Bits) -> dict[str, Any]:
    """A quantized model's `quantization_config` of config.json."""
    return {"quant_method": METHOD, "bits": bits, "group_size": GROUP}


def described_bits(values: Any) -> Bits | None:
    """The bits of a `quantization_config` that `description` wrote; None for any other."""
    if not isinstance(values, dict) or values.get("quant_method") != METHOD or values.get("group_size") != GROUP:
        return None
    bits = values.get("bits")
    return bits if bits in (4, 8) else None


# a model directory's tensors, under our own names ---------------------------------------------------------------------


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


def outline(model: Transformer, shapes: Mapping[str, tuple[int, ...]], where: str) -> Transformer:
    """Make a plain model's outline (without memory) that of the quantized one whose `state` has these shapes: which
    matrices have how many bits, the shapes say. Raises CheckpointError for what is missing or does not fit."""

    def misfit(name: str, shape: tuple[int, ...]) -> CheckpointError:
        return CheckpointError(f"{where}: {name} is {list(shapes[name])}, expected {list(shape)}.")

    def packed(name: str, weight: Tensor) -> Packed | None:
        given = shapes.get(f"{name}.packed")
        if given is None:
            return None
        R, K = weight.shape
        for bits in (4, 8):
            with torch.device("meta"):
                made = Packed(R, K, bits)
            if given == tuple(made.packed.shape):
                return made
        raise misfit(f"{name}.packed", (-(-R // ROWS), K // GROUP, 256))

    replace_matrices(model, packed)
    tied = model.config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if name not in shapes:
            if tied and name.startswith("lm_head."):
                continue
            raise CheckpointError(f"{where} lacks the tensor {name}.")
        if shapes[name] != tuple(tensor.shape):
            raise misfit(name, tuple(tensor.shape))
    return model


@torch.no_grad()
def load_state(model: Transformer, tensors: Mapping[str, Tensor], where: str) -> None:
    """Fill a quantized model, `outline` or not, with what `state` gave. CheckpointError for numbers of another type."""
    for path, module in model.named_modules():
        for name, own in [*module.named_buffers(recurse=False), *module.named_parameters(recurse=False)]:
            full = f"{path}.{name}" if path else name
            if full not in tensors or own is None:
                continue
            value = tensors[full]
            if isinstance(own, nn.Parameter) and value.is_floating_point():
                own.copy_(value)
            elif value.dtype == own.dtype and not isinstance(own, nn.Parameter):
                setattr(module, name, value.clone())  # out of the file, and aligned as the kernels like it
            else:
                raise CheckpointError(f"{where}: {full} is {value.dtype}, expected {own.dtype}.")
