"""Models of the Hugging Face hub, fetched through `huggingface_hub` into its cache."""

from __future__ import annotations

import os
import re
from pathlib import Path

from gptsmith.errors import CheckpointError, UsageError
from gptsmith.formats.hf import WEIGHTS_FILE
from gptsmith.formats.safetensors import INDEX_FILE

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
