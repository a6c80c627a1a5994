"""Models on the Hugging Face hub, downloaded through `huggingface_hub` into its cache."""

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
_HUB_FILES = ["*.json", "*.jinja", "additional_chat_templates/*.jinja", "*.txt", "*.md", "LICENSE*", "tokenizer.model"]
# All but additional_chat_templates: patterns have no "not", and a "*" in them matches "/", too.
_UNUSED_FOLDERS = ["[!a]*/*", "a[!d]*/*", "*/*/*"]


def is_hub_id(spec: str) -> bool:
    """Return whether `spec` can name a model on the hub: `org/name`, `org/name@revision`, or any name after `hf:`.

    Without `hf:`, a name in an existing folder (`runs/bard`) is a path and not a hub id.
    """
    match = _HUB_ID.fullmatch(spec)
    if match is None:
        return False
    return bool(match["explicit"]) or ("/" in match["id"] and not Path(match["id"]).parent.exists())


def hub_model_path(spec: str, *, weights: bool = True) -> Path:
    """Return a hub model's directory in the cache of `huggingface_hub`, downloading the files that are missing.

    Only configuration, tokenizer and (if `weights`) weights are downloaded: safetensors where they exist, else the
    legacy file.
    HF_HUB_OFFLINE, HF_HOME, HF_TOKEN and HF_ENDPOINT are respected.
    Raises UsageError without `huggingface_hub`, CheckpointError if the model does not exist or cannot be downloaded.
    """
    match = _HUB_ID.fullmatch(spec)
    if match is None:
        raise UsageError(f"{spec!r} is not a hub id. Use org/name or org/name@revision.")
    name, revision = match["id"], match["revision"]
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        raise UsageError(
            f"there is no model at {spec}, and downloading {name} from the hub requires huggingface_hub: "
            "pip install 'gptsmith[hub]'."
        ) from None

    def fetch(*files: str) -> Path:
        patterns = [*_HUB_FILES, *files]
        return Path(
            huggingface_hub.snapshot_download(
                name, revision=revision, allow_patterns=patterns, ignore_patterns=_UNUSED_FOLDERS
            )
        )

    try:
        directory = fetch("model*.safetensors") if weights else fetch()
        if weights and not any((directory / file).exists() for file in (WEIGHTS_FILE, INDEX_FILE)):
            directory = fetch("model*.safetensors", "pytorch_model*.bin")
    except errors.GatedRepoError:
        raise CheckpointError(
            f"{name} is gated: accept its terms on its hub page, then log in with `hf auth login`."
        ) from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"there is no model at {spec}, and the hub has no model {name} (if it is private, log in: `hf auth login`)."
        ) from None
    except errors.RevisionNotFoundError:
        raise CheckpointError(f"{name} on the hub has no revision {revision!r}.") from None
    except errors.LocalEntryNotFoundError:
        if _offline():
            reason = "HF_HUB_OFFLINE is set. Unset it"
        else:
            reason = "the hub cannot be reached. Check the network connection"
        raise CheckpointError(
            f"there is no model at {spec}, the hub cache has no complete copy of {name}, and {reason}, or download the "
            f"model on another machine (`hf download {name} --local-dir DIR`) and pass that directory."
        ) from None
    except errors.HFValidationError as error:
        raise UsageError(f"{spec!r} is not a hub id: {error}") from None
    except Exception as error:  # any error of the network library in use
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise CheckpointError(
            f"{name} could not be downloaded from the hub: {reason}. Try again; finished files are kept."
        ) from None
    return directory


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
