"""A quantized model as a directory: what `gptsmith quantize` and `gptsmith.quantize` do."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from gptsmith.checkpoint import save_checkpoint
from gptsmith.errors import TokenizerError, UsageError
from gptsmith.log import note
from gptsmith.model.quantized import BITS, Bits, quantized_state
from gptsmith.model.quantized import quantize as quantize_nearest
from gptsmith.model.transformer import Transformer
from gptsmith.quantize.calibration import calibration_ids
from gptsmith.quantize.layers import open_partial, quantize_layers, round_outer
from gptsmith.quantize.report import Comparison, Reference
from gptsmith.quantize.widths import left_wide, quantizable
from gptsmith.tokenizer import Tokenizer

CALIBRATION_TOKENS, TOKENS = 16_384, 8_192


@dataclass(frozen=True)
class Quantized:
    """The result of `quantize`.

    widths: bits of the matrices of the layers, by name. Bytes are those of the weights in float32, in the file and in
    memory. comparison: with the full model; None if it was not measured.
    """

    out: Path
    bits: Bits
    widths: Mapping[str, Bits]
    bytes_fp32: int
    bytes: int
    bytes_in_memory: int
    comparison: Comparison | None

    def record(self) -> dict[str, Any]:
        """Return the report as plain data."""
        record = {**asdict(self), "out": str(self.out), "widths": dict(self.widths)}
        del record["comparison"]
        if (c := self.comparison) is not None:
            record |= {"tokens": c.tokens, "perplexity_before": c.before, "perplexity_after": c.after}
            record |= {"kl_divergence": c.divergence, "top1_agreement": c.agreement}
        return record


def quantize(
    model: Transformer,
    tokenizer: Tokenizer,
    out: Path | str,
    *,
    bits: Bits = 8,
    calibration: Path | str | None = None,
    calibration_tokens: int = CALIBRATION_TOKENS,
    text: Path | str | None = None,
    tokens: int = TOKENS,
) -> Quantized:
    """Quantize the weights of a model, in place, write it to the directory `out`, and return what it costs.

    bits: 4, 5, 6 or 8; below 8, matrices that matter more get more. calibration: a text file for whose words the
        rounding is chosen (None: a built-in mixture), or "none": each weight is rounded to the nearest.
    text: a file to compare with the full model on (None: Python's documentation), `tokens` of it; 0: do not compare.
    Interrupted, the same call continues. Raises UsageError for a model without such matrices, a directory that exists
    and texts that cannot be used, GptsmithError where the disk is full.
    """
    out = Path(out)
    if out.exists():
        raise UsageError(f"--out {out} already exists. Choose another directory.")
    if bits not in BITS:
        raise UsageError(f"bits must be {', '.join(map(str, BITS[:-1]))} or {BITS[-1]}, not {bits}.")
    if tokens < 0:
        raise UsageError(f"--tokens must be 0 or more, not {tokens}.")
    if not quantizable(model):
        raise UsageError("this model cannot be quantized: it has no matrix whose width is a multiple of 32.")
    reference = _reference(model, tokenizer, None if text is None else Path(text), tokens, out)
    before = _stored_size(model)
    if names := left_wide(model):
        note(
            f"note: {len(names)} matrices stay in full precision, since their width is not a multiple of 32: "
            f"{', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
        )
    partial = out.with_name(f"{out.name}.partial")
    if calibration == "none":
        widths: Mapping[str, Bits] = dict.fromkeys(quantizable(model), bits)
        quantize_nearest(model, bits)
    else:
        path = None if calibration is None else Path(calibration)
        ids = calibration_ids(model, tokenizer, path, tokens=calibration_tokens)
        with _kept(partial):
            widths = open_partial(partial, model, ids, bits, None)
            quantize_layers(model, ids, widths, partial)
        round_outer(model)
    comparison = None if reference is None else reference.compare(model)
    save_checkpoint(out, model, tokenizer)
    if calibration != "none":
        shutil.rmtree(partial, ignore_errors=True)
    in_memory = sum(tensor.nbytes for tensor in _tensors(model))
    return Quantized(out, bits, widths, before, _stored_size(model), in_memory, comparison)


def read_text(path: Path | None) -> str:
    """Return the text to compare on. Raise UsageError if it cannot be read."""
    if path is None:
        from pydoc_data.topics import topics

        return "\n".join(topics.values())
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--text {path} cannot be read: {error}.") from None


def _reference(model: Transformer, tokenizer: Tokenizer, path: Path | None, tokens: int, out: Path) -> Reference | None:
    """Return what is to be known of the full model, if anything is to be measured."""
    if not tokens:
        return None
    text = read_text(path)
    try:
        ids = tokenizer.encode(text[: 20 * tokens])[:tokens]
    except TokenizerError:
        if path is not None:
            raise
        note("note: perplexity not measured: the tokenizer lacks characters of the default text. Use --text FILE.")
        return None
    disk = next(parent for parent in out.absolute().parents if parent.is_dir())
    return Reference(model, ids, prefix=tokenizer.prefix_ids, directory=disk)


@contextmanager
def _kept(partial: Path) -> Iterator[None]:
    """Say where the unfinished work is if the user interrupts."""
    try:
        yield
    except KeyboardInterrupt:
        note(f"Interrupted. Run the same command again to continue, or delete {partial}.")
        raise


def _stored_size(model: Transformer) -> int:
    """Return the bytes of the weights in a file."""
    return sum(tensor.nbytes for tensor in quantized_state(model).values())


def _tensors(model: Transformer) -> list[Tensor]:
    """Return the tensors of a model's state, shared ones once."""
    return list({tensor.data_ptr(): tensor for tensor in model.state_dict().values()}.values())
