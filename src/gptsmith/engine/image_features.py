"""The features of the pictures in prompts, which stand in for token embeddings."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor

from gptsmith.engine.prompt import PromptImage
from gptsmith.errors import GptsmithError
from gptsmith.model.lora import Adapter, applied
from gptsmith.model.transformer import Transformer

MAX_BYTES = 256 << 20  # of features that are kept


class ImageFeatures:
    """Computes the features of one picture at a time, so that they do not depend on others, and keeps recent ones.

    A picture is needed again when its tokens are computed in several steps, and in every turn of a conversation that
    the prefix cache has lost.
    """

    def __init__(self, model: Transformer, max_bytes: int = MAX_BYTES) -> None:
        self._model, self._max_bytes = model, max_bytes
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()
        self._bytes = 0
        self.computed = 0
        """How often the vision tower has run."""

    def of(self, image: PromptImage, adapter: Adapter | None = None, salt: bytes = b"") -> Tensor:
        """Return the features (tokens, C). adapter: of the request, whose updates of the vision tower and the projector
        are applied; salt: what tells it from others.

        Raise GptsmithError if the model makes another number of features than the picture has tokens.
        """
        own = None if adapter is None else _of_vision(adapter)
        key = image.key if own is None else salt + image.key
        known = self._kept.get(key)
        if known is not None:
            self._kept.move_to_end(key)
            return known
        weight = next(p for p in self._model.parameters() if p.is_floating_point())
        pixels = image.pixels[None].to(weight.device, weight.dtype)  # (1, 3, H, W)
        self.computed += 1
        with applied(self._model, [] if own is None else [(own, None)]):
            features: Tensor = self._model.image_features(pixels)[0]  # (tokens, C)
        if len(features) != image.tokens:
            raise GptsmithError(f"the model makes {len(features)} features of a picture with {image.tokens} tokens.")
        self._keep(key, features)
        return features

    def _keep(self, key: bytes, features: Tensor) -> None:
        self._kept[key] = features
        self._bytes += features.nbytes
        while self._bytes > self._max_bytes and len(self._kept) > 1:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        """Forget all features, after a change of the weights."""
        self._kept.clear()
        self._bytes = 0


def place(embeddings: Tensor, features: list[tuple[int, Tensor]]) -> Tensor:
    """Return the embeddings (N, C) with features (n, C) in place of those from a row on: (row, features)."""
    embeddings = embeddings.clone()
    for row, values in features:
        embeddings[row : row + len(values)] = values.to(embeddings.dtype)
    return embeddings


def _of_vision(adapter: Adapter) -> Adapter | None:
    """Return the part of an adapter that changes features of pictures; None if there is none."""
    updates = {name: updates for name, updates in adapter.updates.items() if name.startswith(("vision.", "projector."))}
    return Adapter(adapter.rank, updates) if updates else None
