"""Weight quantization to 8 or 4 bits: a quarter to an eighth of the memory, and of the time of memory-bound decoding.

    quantize(model, 4)                 # in place; outputs stay nearly the same
    dequantize(model)                  # back to float32, with the rounded weights

A weight is a code times the scale of its group (32 columns of a row), in 4 bits plus the group's zero point (a float):
`w = scale · code + zero_point`. GGUF's Q4_0, Q4_1 and Q8_0 are the same numbers in another order. Codes are stored in
the order in which `kernels.cpu_decode` reads them. Where that kernel is not available (another processor, no numba),
PyTorch's kernel computes 4-bit products, and an 8-bit matrix is dequantized each time it is used: correct everywhere,
but slow.

Axis letters: R rows (outputs) · K columns (inputs) · G groups of a row · N tokens · E experts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
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

Bits = Literal[4, 8]
GROUP, ROWS = 32, 16
_CHUNK = 1 << 22  # weights that are rounded at once
METHOD = "gptsmith"  # `quant_method` in config.json's quantization_config


@dataclass(frozen=True)
class Codes:
    """A quantized (R, K) matrix. codes: (R, K) uint8, in 8 bits with an offset of 128; scales: (R, G) float16;
    zero_points: (R, G) float16 in 4 bits, None in 8."""

    bits: Bits
    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None


def concatenate(parts: Sequence[Codes]) -> Codes:
    """Return matrices with the same number of columns and bits, stacked along their rows."""
    zero_points = [part.zero_points for part in parts if part.zero_points is not None]
    return Codes(
        parts[0].bits,
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scales for part in parts]),
        torch.cat(zero_points) if zero_points else None,
    )


def encode(weight: Tensor, bits: Bits) -> Codes:
    """Return a (R, K) matrix, quantized. 8 bits: symmetric about 0. 4 bits: a few ranges are tried for each group, and
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
    best_error = torch.full_like(low, torch.inf)
    best = [torch.zeros_like(groups), torch.zeros_like(low), torch.zeros_like(low)]
    for clipped in (0.0, 0.02, 0.04, 0.06, 0.09, 0.12):  # the share of the range that is cut off at either end
        zero_points = (low + clipped * (high - low)).half().float()
        scales = ((high - low) * (1 - 2 * clipped) / 15).half().float()
        codes = ((groups - zero_points[..., None]) / scales.clamp_min(1e-12)[..., None]).round().clamp(0, 15)
        error = (codes * scales[..., None] + zero_points[..., None] - groups).square().sum(dim=-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        for kept, new in zip(best, (codes, scales, zero_points), strict=True):
            kept.copy_(torch.where(better if new.dim() == 2 else better[..., None], new, kept))
    codes, scales, zero_points = best
    return Codes(4, codes.to(torch.uint8).flatten(1), scales.half(), zero_points.half())


def pack(codes: Tensor, bits: Bits) -> Tensor:
    """Return (R, K) codes in the order of the kernel: (R / 16, G, 64 · bits) uint8.

    A block has sixteen rows (the last one is padded). Within a group of a block come four columns of all rows, then the
    next four. In 4 bits, column 8j + c is in the low half of a byte and column 8j + 4 + c in the high half.
    """
    R, K = codes.shape
    codes = F.pad(codes, (0, 0, 0, -R % ROWS)).view(-1, ROWS, K // GROUP, GROUP // 4, 4).permute(0, 2, 3, 1, 4)
    if bits == 4:
        codes = codes[:, :, ::2] | (codes[:, :, 1::2] << 4)
    return codes.reshape(codes.shape[0], codes.shape[1], -1).contiguous()


def unpack(packed: Tensor, bits: Bits, rows: int) -> Tensor:
    """Invert `pack`: return the (R, K) codes."""
    blocks, G, _ = packed.shape
    codes = packed.view(blocks, G, -1, ROWS, 4)
    if bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), dim=3).flatten(2, 3)
    return codes.permute(0, 3, 1, 2, 4).reshape(blocks * ROWS, G * GROUP)[:rows]


def _by_block(values: Tensor) -> Tensor:
    """Return scales or zero points (R, G) by block of rows: (R / 16, G, 16), the last block padded."""
    R, G = values.shape
    return F.pad(values, (0, 0, 0, -R % ROWS)).view(-1, ROWS, G).transpose(1, 2).contiguous()


class QuantizedMatrix(nn.Module):
    """A quantized (R, K) matrix. packed: as from `pack`; scales, zero_points: (R / 16, G, 16) float16."""

    packed: Tensor
    scales: Tensor
    zero_points: Tensor

    def __init__(self, rows: int, columns: int, bits: Bits) -> None:
        super().__init__()
        self.rows, self.columns, self.bits = rows, columns, bits
        blocks, G = -(-rows // ROWS), columns // GROUP
        self.register_buffer("packed", torch.zeros(blocks, G, 64 * bits, dtype=torch.uint8))
        self.register_buffer("scales", torch.zeros(blocks, G, ROWS, dtype=torch.float16))
        self.register_buffer("zero_points", torch.zeros(blocks if bits == 4 else 0, G, ROWS, dtype=torch.float16))
        self._for_torch: tuple[Tensor, Tensor, Tensor] | None = None

    @classmethod
    def of(cls, matrix: Codes) -> QuantizedMatrix:
        made = cls(matrix.codes.shape[0], matrix.codes.shape[1], matrix.bits)
        made.packed, made.scales = pack(matrix.codes, matrix.bits), _by_block(matrix.scales)
        if matrix.zero_points is not None:
            made.zero_points = _by_block(matrix.zero_points)
        return made

    def dequantized(self) -> Tensor:
        """Return the matrix: (R, K) float32."""
        return self._values(unpack(self.packed, self.bits, self.rows), slice(None))

    def rows_at(self, index: Tensor) -> Tensor:
        """Return the rows of these indices (n,): (n, K) float32."""
        blocks = self.packed[index // ROWS]  # (n, G, 64 · bits), a sixteenth of which is the row's
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
        for run, up_proj, down_proj in zip(runs, self.up_proj, self.down_proj, strict=True):
            if len(run):
                gate, up = up_proj.multiply(run).chunk(2, dim=-1)
                outputs.append(down_proj.multiply(self.activation(gate) * up))
        return outputs


def can_quantize(weight: Tensor) -> bool:
    """Return whether the matrix consists of whole groups of columns."""
    return weight.shape[-1] % GROUP == 0


@torch.no_grad()
def replace_matrices(model: Transformer, replacement: Callable[[str, Tensor], QuantizedMatrix | None]) -> Transformer:
    """Replace every matrix of the model by `replacement(name, weight)`, in place; None: keep it.

    Norms, biases, positions, routers, gates and matrices whose width is not a multiple of 32 are always kept. An
    expert's name is like `layers.0.mlp.up_proj.3`; either all experts of a layer are replaced, or none.
    """
    for path, module in list(model.named_modules()):
        prefix = f"{path}." if path else ""
        if isinstance(module, MixtureOfExperts) and can_quantize(module.up_proj) and can_quantize(module.down_proj):
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
    """Quantize the model's matrices to 4 or 8 bits, in place (see `replace_matrices`), and return it.

    keep: modules that stay as they are (`embed_tokens`, with which a tied output layer stays, too).

    Embeddings and output layer always have 8 bits, since 4 would cost most quality there.
    Raises UsageError for another number of bits, or if there is nothing to quantize.
    """
    if bits not in (4, 8):
        raise UsageError(f"--bits must be 4 or 8, not {bits}.")

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
    return bits if bits in (4, 8) else None


# the tensors of a model directory -------------------------------------------------------------------------------------


def _stored_name(name: str) -> str:
    """Return the name under which a tensor is stored: zero points have kept their first one."""
    return re.sub(r"\.zero_points$", ".least", name)


def quantized_state(model: Transformer) -> dict[str, Tensor]:
    """Return the tensors to save of a quantized model, by name; shared ones once."""
    seen: set[int] = set()
    tensors = {}
    for name, tensor in model.state_dict().items():
        if tensor.numel() and tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        tensors[_stored_name(name)] = tensor.contiguous()
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
        for bits in (4, 8):
            with torch.device("meta"):
                matrix = QuantizedMatrix(R, K, bits)
            if shape == tuple(matrix.packed.shape):
                return matrix
        raise misfit(f"{name}.packed", (-(-R // ROWS), K // GROUP, 256))

    replace_matrices(model, stored_matrix)
    tied = model.config.tie_word_embeddings
    for local_name, tensor in model.state_dict().items():
        name = _stored_name(local_name)
        if name not in shapes:
            if tied and name.startswith("lm_head."):
                continue
            raise CheckpointError(f"{where} has no tensor {name}.")
        if shapes[name] != tuple(tensor.shape):
            raise misfit(name, tuple(tensor.shape))
    return model


@torch.no_grad()
def load_quantized_state(model: Transformer, tensors: Mapping[str, Tensor], where: str) -> None:
    """Fill a quantized model with what `quantized_state` returned.

    Buffers may be on the meta device; parameters need memory. Raises CheckpointError for a tensor of another dtype.
    """
    for path, module in model.named_modules():
        for local_name, own in [*module.named_buffers(recurse=False), *module.named_parameters(recurse=False)]:
            name = _stored_name(f"{path}.{local_name}" if path else local_name)
            if name not in tensors or own is None:
                continue
            value = tensors[name]
            if isinstance(own, nn.Parameter) and value.is_floating_point():
                own.copy_(value)
            elif value.dtype == own.dtype and not isinstance(own, nn.Parameter):
                setattr(module, local_name, value.clone())  # a copy in memory, aligned for the kernels
            else:
                raise CheckpointError(f"{where}: {name} is {value.dtype}, expected {own.dtype}.")
