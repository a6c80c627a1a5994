"""Matrices in temporary files, for which there is no room in memory."""

from __future__ import annotations

import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptsmith.storage import explain_os_errors


class FileMatrix:
    """A matrix (R, K) float32 in an unnamed temporary file, deleted when the object or the process ends.

    It has to be written before it is read. directory: where the file is made; None: where temporary files are.
    Raises GptsmithError if the disk is full.
    """

    def __init__(self, rows: int, columns: int, directory: Path | None = None) -> None:
        self.rows, self.columns, self.directory = rows, columns, directory
        self._where = directory or Path(tempfile.gettempdir())
        with explain_os_errors(self._where):
            self._file: Any = tempfile.TemporaryFile(dir=self._where, buffering=0)  # noqa: SIM115
        weakref.finalize(self, self._file.close)

    def write(self, row: int, values: Tensor, column: int = 0) -> None:
        """Write a part of the matrix, (n, k) or (k,), that begins at a row and a column."""
        if not values.numel():
            return
        values = values.detach().float().cpu().reshape(-1, values.shape[-1]).contiguous()
        whole_rows = values.shape[1] == self.columns
        for at, part in enumerate([values] if whole_rows else values):
            data = _bytes(part)
            with explain_os_errors(self._where):
                self._file.seek(4 * ((row + at) * self.columns + column))
                while data:
                    data = data[self._file.write(data) :]

    def read(self, begin: int, end: int) -> Tensor:
        """Return the rows from `begin` to before `end`."""
        found = torch.empty(end - begin, self.columns)
        self._read(begin, found)
        return found

    def gather(self, rows: Tensor) -> Tensor:
        """Return the rows of these indices, (n,): (n, K)."""
        found = torch.empty(len(rows), self.columns)
        for row, place in zip(rows.tolist(), found, strict=True):
            self._read(row, place)
        return found

    def _read(self, row: int, target: Tensor) -> None:
        data = _bytes(target)
        with explain_os_errors(self._where):
            self._file.seek(4 * row * self.columns)
            while data:
                count = self._file.readinto(data)
                if not count:
                    raise EOFError("a part of the matrix has not been written")
                data = data[count:]


def _bytes(numbers: Tensor) -> memoryview:
    array: Any = numbers.numpy()
    return memoryview(array).cast("B")
