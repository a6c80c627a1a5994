"""Weight quantization to 4 to 8 bits: a quarter to an eighth of the memory, and of the time of memory-bound decoding.

    quantize(model, 4)                 # in place; outputs stay nearly the same
    dequantize(model)                  # back to float32, with the rounded weights

A weight is a code times the scale of its group (32 columns of a row), below 8 bits plus the group's zero point (a
float): `w = scale · code + zero_point`. GGUF's Q4_0, Q4_1 and Q8_0 are the same numbers in another order. Codes are
stored in the order in which `kernels.cpu_decode` reads them. Where that kernel is not available (another processor, no
numba), PyTorch's kernel computes 4-bit products, and any other matrix is dequantized each time it is used: correct
everywhere, but slow.

In a file, scales and zero points can take 8 bits each instead of 16: multiples of two numbers of the row, its units.
`gptsmith.quantize` chooses such scales.

Axis letters: R rows (outputs) · K columns (inputs) · G groups of a row · N tokens · E experts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptsmith.errors import CheckpointError, UsageError
from gptsmith.kernels.threads import kernels_available, quantized_linear
from gptsmith.model.documents import is_fake
from gptsmith.model.moe import MixtureOfExperts
from gptsmith.model.transformer import Transformer

Bits = Literal[4, 5, 6, 8]
BITS: tuple[Bits, ...] = (4, 5, 6, 8)
GROUP, ROWS = 32, 16
_CHUNK = 1 << 22  # weights that are rounded at once
METHOD = "gptsmith"  # `quant_method` in config.json's quantization_config


@dataclass(frozen=True)
class Codes:
    """A quantized (R, K) matrix. codes: (R, K) uint8, in 8 bits with an offset of 128; scales: (R, G) float16;
    zero_points: (R, G) float16 below 8 bits, None in 8. units: (R, 2) bfloat16 if scales and zero points are such as
    `scales_of` computes from 8 bits; None for any others."""

    bits: Bits
    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None
    units: Tensor | None = None

    def rows(self, order: Tensor) -> Codes:
        """Return the rows of these indices, (n,) int64."""
        zero_points = None if self.zero_points is None else self.zero_points[order]
        return Codes(self.bits, self.codes[order], self.scales[order], zero_points)

    def values(self, rows: Tensor) -> Tensor:
        """Return the numbers of the rows of these indices: (n, K) float32."""
        codes = self.codes[rows].float().view(len(rows), -1, GROUP)
        if self.zero_points is None:
            codes -= 128
        codes *= self.scales[rows].float()[..., None]
        if self.zero_points is not None:
            codes += self.zero_points[rows].float()[..., None]
        return codes.flatten(1)

    def scaled(self, factor: float) -> Codes:
        """Return the matrix times a number."""
        if factor == 1:
            return self
        zero_points = None if self.zero_points is None else (self.zero_points.float() * factor).half()
        return Codes(self.bits, self.codes, (self.scales.float() * factor).half(), zero_points)


def fits_half(scales: Tensor) -> bool:
    """Return whether scales keep their precision in float16, compared with the largest of them."""
    return bool((scales.half().float() - scales).abs().max() <= scales.abs().max() * 2**-10)


def concatenate(parts: Sequence[Codes]) -> Codes:
    """Return matrices with the same number of columns and bits, stacked along their rows."""
    zero_points = [part.zero_points for part in parts if part.zero_points is not None]
    units = [part.units for part in parts if part.units is not None]
    return Codes(
        parts[0].bits,
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scales for part in parts]),
        torch.cat(zero_points) if zero_points else None,
        torch.cat(units) if len(units) == len(parts) else None,
    )


def encode(weight: Tensor, bits: Bits) -> Codes:
    """Return a (R, K) matrix, quantized. 8 bits: symmetric about 0. Fewer: a few ranges are tried for each group, and
    the one with the smallest squared error is taken."""
    rows = max(1, _CHUNK // weight.shape[1])
    return concatenate([_encode(part, bits) for part in torch.split(weight, rows)])


def _encode(weight: Tensor, bits: Bits) -> Codes:
    groups = weight.float().reshape(len(weight), -1, GROUP)  # (R, G, 32)
    if bits == 8:
        scales = (groups.abs().amax(dim=-1) / 127).half()
        codes = (groups / scales.float().clamp_min(1e-12)[..., None]).round().clamp(-127, 127)
        return Codes(8, (codes + 128).to(torch.uint8).flatten(1), scales, None)
    low, high = groups.amin(dim=-1), groups.amax(dim=-1)
    most = 2**bits - 1
    best_error = torch.full_like(low, torch.inf)
    best = [torch.zeros_like(groups), torch.zeros_like(low), torch.zeros_like(low)]
    for clipped in (0.0, 0.02, 0.04, 0.06, 0.09, 0.12):  # the share of the range that is cut off at either end
        zero_points = (low + clipped * (high - low)).half().float()
        scales = ((high - low) * (1 - 2 * clipped) / most).half().float()
        codes = ((groups - zero_points[..., None]) / scales.clamp_min(1e-12)[..., None]).round().clamp(0, most)
        error = (codes * scales[..., None] + zero_points[..., None] - groups).square().sum(dim=-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        for kept, new in zip(best, (codes, scales, zero_points), strict=True):
            kept.copy_(torch.where(better if new.dim() == 2 else better[..., None], new, kept))
    codes, scales, zero_points = best
    return Codes(bits, codes.to(torch.uint8).flatten(1), scales.half(), zero_points.half())


def scales_of(
    scale_codes: Tensor, zero_codes: Tensor | None, scale_units: Tensor, zero_units: Tensor | None, bits: Bits
) -> tuple[Tensor, Tensor | None]:
    """Return the scales and zero points, float16, of codes of 8 bits that are multiplied by units of the row.

    scale_codes: uint8; zero_codes: int8, of the middle of a group's range. Units are of a shape that broadcasts.
    """
    scales = (scale_codes.float() * scale_units.float()).half()
    if zero_codes is None or zero_units is None:
        return scales, None
    middle = zero_codes.float() * zero_units.float()
    return scales, (middle - scales.float() * ((2**bits - 1) / 2)).half()


def codes_of_scales(
    scales: Tensor, zero_points: Tensor | None, scale_units: Tensor, zero_units: Tensor | None, bits: Bits
) -> tuple[Tensor, Tensor | None] | None:
    """Invert `scales_of`; None if no codes give exactly these numbers."""
    units = scale_units.float().clamp_min(1e-30)
    scale_codes = (scales.float() / units).round().clamp(0, 255).to(torch.uint8)
    zero_codes = None
    if zero_points is not None and zero_units is not None:
        middle = zero_points.float() + scales.float() * ((2**bits - 1) / 2)
        units = zero_units.float().clamp_min(1e-30)
        zero_codes = (middle / units).round().clamp(-127, 127).to(torch.int8)
    again, zero_again = scales_of(scale_codes, zero_codes, scale_units, zero_units, bits)
    same = torch.equal(again, scales) and (zero_points is None or torch.equal(zero_points, zero_again))  # type: ignore[arg-type]
    return (scale_codes, zero_codes) if same else None


def pack(codes: Tensor, bits: Bits) -> Tensor:
    """Return (R, K) codes in the order of the kernel: (R / 16, G, 64 · bits) uint8.

    A block has sixteen rows (the last one is padded). Within a group of a block come four columns of all rows, then the
    next four. Below 8 bits, column 8j + c is in the low half of a byte and column 8j + 4 + c in the high half; for each
    further bit, 64 bytes follow that have this bit of the codes, in the same order.
    """
    R, K = codes.shape
    codes = F.pad(codes, (0, 0, 0, -R % ROWS)).view(-1, ROWS, K // GROUP, GROUP // 4, 4).permute(0, 2, 3, 1, 4)
    if bits == 8:
        return codes.reshape(codes.shape[0], codes.shape[1], -1).contiguous()
    low = codes & 15
    parts = [(low[:, :, ::2] | (low[:, :, 1::2] << 4)).flatten(2)]
    powers = 2 ** torch.arange(8, dtype=torch.uint8, device=codes.device)
    for bit in range(4, bits):
        plane = ((codes >> bit) & 1).reshape(*codes.shape[:2], -1, 8)
        parts.append((plane * powers).sum(dim=-1, dtype=torch.uint8))
    return torch.cat(parts, dim=2).contiguous()


def unpack(packed: Tensor, bits: Bits, rows: int) -> Tensor:
    """Invert `pack`: return the (R, K) codes."""
    codes = _unpacked(packed, bits)
    blocks, G = codes.shape[:2]
    return codes.permute(0, 3, 1, 2, 4).reshape(blocks * ROWS, G * GROUP)[:rows]


def _unpacked(packed: Tensor, bits: Bits) -> Tensor:
    """Return the codes of blocks (n, G, 64 · bits): (n, G, 8, 16, 4), the steps of four columns before the rows."""
    n, G, _ = packed.shape
    if bits == 8:
        return packed.view(n, G, -1, ROWS, 4)
    low = packed[:, :, :256].reshape(n, G, -1, ROWS, 4)
    codes = torch.stack((low & 15, low >> 4), dim=3).flatten(2, 3)
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    for bit in range(4, bits):
        plane = packed[:, :, 64 * bit : 64 * bit + 64]
        codes = codes | (((plane[..., None] >> shifts) & 1) << bit).view_as(codes)
    return codes


def _by_block(values: Tensor) -> Tensor:
    """Return scales or zero points (R, G) by block of rows: (R / 16, G, 16), the last block padded."""
    R, G = values.shape
    return F.pad(values, (0, 0, 0, -R % ROWS)).view(-1, ROWS, G).transpose(1, 2).contiguous()


class QuantizedMatrix(nn.Module):
    """A quantized (R, K) matrix. packed: as from `pack`; scales, zero_points: (R / 16, G, 16) float16; units: of scales
    and of zero points, (R / 16, 2, 16) bfloat16, or empty, see `Codes`."""

    packed: Tensor
    scales: Tensor
    zero_points: Tensor
    units: Tensor

    def __init__(self, rows: int, columns: int, bits: Bits) -> None:
        super().__init__()
        self.rows, self.columns, self.bits = rows, columns, bits
        blocks, G = -(-rows // ROWS), columns // GROUP
        self.register_buffer("packed", torch.zeros(blocks, G, 64 * bits, dtype=torch.uint8))
        self.register_buffer("scales", torch.zeros(blocks, G, ROWS, dtype=torch.float16))
        self.register_buffer("zero_points", torch.zeros(blocks if bits < 8 else 0, G, ROWS, dtype=torch.float16))
        self.register_buffer("units", torch.zeros(0, 2, ROWS, dtype=torch.bfloat16))
        self._for_torch: tuple[Tensor, Tensor, Tensor] | None = None

    @classmethod
    def of(cls, matrix: Codes) -> QuantizedMatrix:
        return cls.stacked(len(matrix.codes), [matrix])

    @classmethod
    def stacked(cls, rows: int, parts: Iterable[Codes]) -> QuantizedMatrix:
        """Return a matrix of parts, one below the other, of which only one is needed at a time. But for the last one,
        each has a multiple of 16 rows."""
        made, block = cls(0, 0, 8), 0
        for part in parts:
            buffers = {"packed": pack(part.codes, part.bits), "scales": _by_block(part.scales)}
            if part.zero_points is not None:
                buffers["zero_points"] = _by_block(part.zero_points)
            if part.units is not None:
                buffers["units"] = _by_block(part.units)
            if block == 0:
                made = cls(rows, part.codes.shape[1], part.bits)
                made.units = made.units.new_zeros(len(made.packed) if part.units is not None else 0, 2, ROWS)
            for name, values in buffers.items():
                getattr(made, name)[block : block + len(values)] = values
            block += len(buffers["packed"])
        return made

    def stored(self) -> dict[str, Tensor]:
        """Return the buffers as they are stored, by name: scales and zero points in 8 bits if they are such."""
        buffers = dict(self.named_buffers())
        if len(self.units):
            zero_points = self.zero_points if self.bits < 8 else None
            codes = codes_of_scales(self.scales, zero_points, self.units[:, :1], self.units[:, 1:], self.bits)
            if codes is None:
                return buffers | {"units": self.units[:0]}
            buffers["scales"], zero_codes = codes
            buffers["zero_points"] = self.zero_points.to(torch.int8) if zero_codes is None else zero_codes
        return buffers

    def load(self, buffers: Mapping[str, Tensor]) -> None:
        """Fill the matrix with what `stored` returned. The tensors are copied."""
        copies = {name: tensor.clone() for name, tensor in buffers.items()}  # in memory, aligned for the kernels
        if len(copies.get("units", ())):
            zero_codes, units = copies["zero_points"] if self.bits < 8 else None, copies["units"]
            copies["scales"], zero_points = scales_of(
                copies["scales"], zero_codes, units[:, :1], units[:, 1:], self.bits
            )
            copies["zero_points"] = copies["zero_points"].half() if zero_points is None else zero_points
        copies.setdefault("units", torch.zeros(0, 2, ROWS, dtype=torch.bfloat16))  # earlier versions stored none
        for name, tensor in copies.items():
            setattr(self, name, tensor)

    def dequantized(self) -> Tensor:
        """Return the matrix: (R, K) float32."""
        return self._values(unpack(self.packed, self.bits, self.rows), slice(None))

    def rows_at(self, index: Tensor) -> Tensor:
        """Return the rows of these indices (n,): (n, K) float32."""
        codes = _unpacked(self.packed[index // ROWS], self.bits)  # a sixteenth of which are the row's
        codes = codes[torch.arange(len(index), device=index.device), :, :, index % ROWS]  # (n, G, 8, 4)
        return self._values(codes.flatten(1), index)

    def _values(self, codes: Tensor, rows: Tensor | slice) -> Tensor:
        scales = self.scales.transpose(1, 2).flatten(0, 1)[: self.rows][rows].float()  # (n, G)
        values: Tensor = codes.float().reshape(len(codes), -1, GROUP)
        if self.bits == 8:
            return ((values - 128) * scales[..., None]).flatten(1)
        zero_points = self.zero_points.transpose(1, 2).flatten(0, 1)[: self.rows][rows].float()
        return (values * scales[..., None] + zero_points[..., None]).flatten(1)

    def multiply(self, x: Tensor) -> Tensor:
        """Return x (..., K) times the transposed matrix: (..., R). Differentiable with respect to x."""
        if x.requires_grad and torch.is_grad_enabled():
            apply: Callable[..., Tensor] = _Product.apply
            return apply(x, self)
        return self._multiply(x)

    def _multiply(self, x: Tensor) -> Tensor:
        if is_fake(x):  # in a memory forecast; kernels need numbers
            return x.new_empty(*x.shape[:-1], self.rows)
        if x.device.type != "cpu" or x.dtype != torch.float32:
            return F.linear(x, self.dequantized().to(x.dtype))
        if kernels_available():
            return quantized_linear(x, self.packed, self.scales, self.zero_points, self.rows, self.bits)
        if self.bits == 4 and self.rows % ROWS == 0:
            return self._multiply_by_torch(x)
        return F.linear(x, self.dequantized())

    def _multiply_by_torch(self, x: Tensor) -> Tensor:
        """Multiply with PyTorch's kernel, which has its own order of codes, and its zero point at code 8."""
        if self._for_torch is None or self._for_torch[0] is not self.packed:
            codes = unpack(self.packed, 4, self.rows).int()
            scales, zero_points = (
                s.transpose(1, 2).flatten(0, 1)[: self.rows].float() for s in (self.scales, self.zero_points)
            )
            affine = torch.stack((scales, zero_points + 8 * scales), dim=-1).transpose(0, 1).contiguous()  # (G, R, 2)
            self._for_torch = self.packed, torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1), affine
        _, weight, affine = self._for_torch
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x.reshape(-1, self.columns), weight, GROUP, affine)
        return y.view(*x.shape[:-1], self.rows)


class _Product(torch.autograd.Function):
    """A product with a quantized matrix, which is constant: training an adapter beside it needs no gradient of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: QuantizedMatrix) -> Tensor:
        ctx.matrix = matrix
        return matrix._multiply(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (grad,) = gradients
        return grad @ ctx.matrix.dequantized().to(grad.dtype), None


class QuantizedLinear(nn.Module):
    """An `nn.Linear` with a quantized weight."""

    def __init__(self, weight: QuantizedMatrix, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        y = self.weight.multiply(x)
        return y if self.bias is None else y + self.bias


class QuantizedEmbedding(nn.Module):
    """An `nn.Embedding` with a quantized table, which the output layer may share."""

    def __init__(self, weight: QuantizedMatrix) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight.rows_at(ids.flatten()).view(*ids.shape, -1)


class QuantizedExperts(MixtureOfExperts):
    """A mixture of experts with quantized experts; the router is not quantized."""

    up_proj: Any
    down_proj: Any

    def run_experts(self, runs: tuple[Tensor, ...]) -> list[Tensor]:
        outputs = []
        parts = zip(runs, self.up_proj, self.down_proj, *self.biases(), strict=True)
        for run, up_proj, down_proj, up_bias, down_bias in parts:
            if len(run):
                hidden = up_proj.multiply(run)
                gate, up = (hidden if up_bias is None else hidden + up_bias).chunk(2, dim=-1)
                output = down_proj.multiply(self.gate(gate, up))
                outputs.append(output if down_bias is None else output + down_bias)
        return outputs


def can_quantize(weight: Tensor) -> bool:
    """Return whether the matrix consists of whole groups of columns."""
    return weight.shape[-1] % GROUP == 0


@torch.no_grad()
def replace_matrices(model: Transformer, replacement: Callable[[str, Tensor], QuantizedMatrix | None]) -> Transformer:
    """Replace every matrix of the model by `replacement(name, weight)`, in place; None: keep it.

    Norms, biases, positions, routers, gates, vision towers with their projectors, and matrices whose width is not a
    multiple of 32 are always kept. An expert's name is like `layers.0.mlp.up_proj.3`; either all experts of a layer
    are replaced, or none.
    """
    for path, module in list(model.named_modules()):
        prefix = f"{path}." if path else ""
        if path.partition(".")[0] in ("vision", "projector"):
            continue
        plain = isinstance(module, MixtureOfExperts) and not isinstance(module, QuantizedExperts)
        if plain and can_quantize(module.up_proj) and can_quantize(module.down_proj):
            experts = {
                name: [replacement(f"{prefix}{name}.{e}", weight) for e, weight in enumerate(getattr(module, name))]
                for name in ("up_proj", "down_proj")
            }
            if all(matrix is not None for matrices in experts.values() for matrix in matrices):
                module.__class__ = QuantizedExperts
                for name, matrices in experts.items():
                    delattr(module, name)
                    setattr(module, name, nn.ModuleList(matrix for matrix in matrices if matrix is not None))
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and name not in ("router", "shared_gate", "lm_head"):
                made = replacement(f"{prefix}{name}.weight", child.weight) if can_quantize(child.weight) else None
                if made is not None:
                    setattr(module, name, QuantizedLinear(made, child.bias))
    untyped: Any = model  # the types of its modules change
    if can_quantize(model.embed_tokens.weight):
        table = replacement("embed_tokens.weight", model.embed_tokens.weight)
        tied = model.config.tie_word_embeddings
        head = table if tied else replacement("lm_head.weight", model.lm_head.weight)
        if table is not None:
            untyped.embed_tokens = QuantizedEmbedding(table)
        if head is not None:
            untyped.lm_head = QuantizedLinear(head, None)
    return model


def quantize(model: Transformer, bits: Bits, *, keep: Collection[str] = ()) -> Transformer:
    """Quantize the model's matrices to 4, 5, 6 or 8 bits, in place (see `replace_matrices`), and return it.

    keep: modules that stay as they are (`embed_tokens`, with which a tied output layer stays, too).

    Embeddings and output layer always have 8 bits, since 4 would cost most quality there.
    Raises UsageError for another number of bits, or if there is nothing to quantize.
    """
    if bits not in BITS:
        raise UsageError(f"--bits must be 4, 5, 6 or 8, not {bits}.")

    def quantized(name: str, weight: Tensor) -> QuantizedMatrix | None:
        if name.removesuffix(".weight") in keep:
            return None
        outer = name in ("lm_head.weight", "embed_tokens.weight")
        return QuantizedMatrix.of(encode(weight.detach(), 8 if outer else bits))

    replace_matrices(model, quantized)
    if bits_of(model) is None:
        raise UsageError("this model cannot be quantized: it has no matrix whose width is a multiple of 32.")
    return model


def quantize_on_gpu(model: Transformer, bits: Bits) -> Transformer:
    """Quantize the linear layers of a bfloat16 model on a GPU with torchao, in place, and return it.

    4 bits: in groups of 32 columns, with PyTorch's kernel. Embeddings, output layer and experts stay bfloat16.
    Raises UsageError if torchao is not installed.
    """
    try:
        from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
    except ImportError:
        raise UsageError(
            "quantization on a GPU needs torchao: pip install 'gptsmith[gpu]', or use --device cpu."
        ) from None
    if bits == 4:
        config = Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format="tile_packed_to_4d")
    else:
        config = Int8WeightOnlyConfig()

    def chosen(module: nn.Module, name: str) -> bool:
        plain = isinstance(module, nn.Linear) and can_quantize(module.weight)
        return plain and name.rpartition(".")[2] not in ("router", "shared_gate", "lm_head")

    quantize_(model, config, filter_fn=chosen)
    return model


@torch.no_grad()
def dequantize(model: Transformer) -> Transformer:
    """Turn quantized matrices into float32 in plain layers, in place; their rounded values stay. Return the model."""
    for module in list(model.modules()):
        if isinstance(module, QuantizedExperts):
            for name in ("up_proj", "down_proj"):
                matrices = torch.stack([matrix.dequantized() for matrix in getattr(module, name)])
                delattr(module, name)
                setattr(module, name, nn.Parameter(matrices))
            module.__class__ = MixtureOfExperts  # type: ignore[assignment]
        for name, child in list(module.named_children()):
            if isinstance(child, QuantizedLinear):
                with torch.device("meta"):
                    plain = nn.Linear(child.weight.columns, child.weight.rows, bias=False)
                plain.weight, plain.bias = nn.Parameter(child.weight.dequantized()), child.bias  # type: ignore[assignment]
                setattr(module, name, plain)
    table: nn.Module = model.embed_tokens
    if isinstance(table, QuantizedEmbedding):
        matrix = table.weight.dequantized()
        model.embed_tokens = nn.Embedding(matrix.shape[0], matrix.shape[1], _weight=matrix)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    return model


def bits_of(model: nn.Module) -> Bits | None:
    """Return the smallest number of bits of the model's matrices; None for a plain model."""
    found: set[Bits] = {module.bits for module in model.modules() if isinstance(module, QuantizedMatrix)}
    return min(found, default=None)


def quantization_config(bits: Bits) -> dict[str, Any]:
    """Return the `quantization_config` of a quantized model's config.json."""
    return {"quant_method": METHOD, "bits": bits, "group_size": GROUP}


def bits_of_config(values: Any) -> Bits | None:
    """Return the bits of a `quantization_config` that this package wrote; None for any other."""
    if not isinstance(values, dict) or values.get("quant_method") != METHOD or values.get("group_size") != GROUP:
        return None
    bits = values.get("bits")
    return bits if bits in BITS else None


# the tensors of a model directory -------------------------------------------------------------------------------------


def _stored_name(name: str) -> str:
    """Return the name under which a tensor is stored: zero points have kept their first one."""
    return re.sub(r"\.zero_points$", ".least", name)


def quantized_state(model: Transformer) -> dict[str, Tensor]:
    """Return the tensors to save of a quantized model, by name; shared ones once."""
    seen: set[int] = set()
    tensors = {}
    compact: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if isinstance(module, QuantizedMatrix):
            compact |= {f"{path}.{name}": buffer for name, buffer in module.stored().items()}
    for name, tensor in model.state_dict().items():
        if tensor.numel() and tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        tensors[_stored_name(name)] = compact.get(name, tensor).contiguous()
    return tensors


def quantize_skeleton(model: Transformer, shapes: Mapping[str, tuple[int, ...]], where: str) -> Transformer:
    """Give a model on the meta device the quantized matrices of a model whose `quantized_state` has these shapes.

    The shapes tell which matrices have how many bits. where: the file, for messages.
    Raises CheckpointError for a missing tensor or a shape that does not fit.
    """

    def misfit(name: str, shape: tuple[int, ...]) -> CheckpointError:
        return CheckpointError(f"{where}: {name} is {list(shapes[name])}, expected {list(shape)}.")

    def stored_matrix(name: str, weight: Tensor) -> QuantizedMatrix | None:
        shape = shapes.get(f"{name}.packed")
        if shape is None:
            return None
        R, K = weight.shape
        for bits in BITS:
            with torch.device("meta"):
                matrix = QuantizedMatrix(R, K, bits)
            if shape == tuple(matrix.packed.shape):
                return matrix
        raise misfit(f"{name}.packed", (-(-R // ROWS), K // GROUP, 256))

    replace_matrices(model, stored_matrix)
    tied = model.config.tie_word_embeddings
    for local_name, tensor in model.state_dict().items():
        name, shape = _stored_name(local_name), tuple(tensor.shape)
        if name not in shapes:
            if (tied and name.startswith("lm_head.")) or name.endswith(".units"):  # earlier versions had none
                continue
            raise CheckpointError(f"{where} has no tensor {name}.")
        if name.endswith(".units") and shapes[name][0]:
            shape = (shapes[name.removesuffix("units") + "packed"][0], *shape[1:])
        if shapes[name] != shape:
            raise misfit(name, shape)
    return model


@torch.no_grad()
def load_quantized_state(model: Transformer, tensors: Mapping[str, Tensor], where: str) -> None:
    """Fill a quantized model with what `quantized_state` returned.

    Buffers may be on the meta device; parameters need memory. Raises CheckpointError for a tensor of another dtype.
    """
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for local_name, parameter in module.named_parameters(recurse=False):
            value = tensors.get(f"{prefix}{local_name}")
            if value is None:
                continue
            if not value.is_floating_point():
                raise CheckpointError(f"{where}: {prefix}{local_name} is {value.dtype}, expected {parameter.dtype}.")
            parameter.copy_(value)
        if isinstance(module, QuantizedMatrix):
            names = {name: _stored_name(f"{prefix}{name}") for name, _ in module.named_buffers()}
            found = {name: tensors[stored] for name, stored in names.items() if stored in tensors}
            compact = len(found.get("units", ())) > 0
            dtypes = {name: buffer.dtype for name, buffer in module.named_buffers()}
            if compact:
                dtypes |= {"scales": torch.uint8, "zero_points": torch.int8}
            for name, value in found.items():
                if value.dtype != dtypes[name]:
                    raise CheckpointError(f"{where}: {names[name]} is {value.dtype}, expected {dtypes[name]}.")
            if found:
                module.load(found)
