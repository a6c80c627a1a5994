from __future__ import annotations

import io

import torch
from safetensors.torch import load, save

from gptsmith.formats.safetensors_writer import write_tensors

MIXED = {
    "b": torch.rand(3, 5),
    "a": torch.rand(4, 7),
    "ü": torch.rand(2).bfloat16(),
    "count": torch.tensor(3.0),
    "none": torch.zeros(0, 4),
    "half": torch.rand(3).half(),
    "double": torch.rand(2).double(),
    "yes": torch.tensor([True, False]),
    **{
        str(dtype): torch.arange(5, dtype=dtype)
        for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    },
}


def test_the_bytes_are_those_of_the_library() -> None:
    for tensors in (MIXED, {"only": torch.rand(3)}, {"bytes": torch.arange(7, dtype=torch.uint8), "x": torch.rand(1)}):
        file = io.BytesIO()
        write_tensors(file, tensors)
        assert file.getvalue() == save(tensors, metadata={"format": "pt"})


def test_views_and_parameters() -> None:
    matrix = torch.nn.Parameter(torch.rand(4, 6))
    views = {"transposed": matrix.T, "rows": matrix[1:3], "columns": matrix[:, ::2], "same": matrix}
    file = io.BytesIO()
    write_tensors(file, views)
    found = load(file.getvalue())
    assert found.keys() == views.keys()
    assert all(torch.equal(found[name], view) for name, view in views.items())
