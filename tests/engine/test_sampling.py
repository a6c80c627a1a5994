"""The sampling options: validation, and the two command lines that derive from them."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields

import pytest

from gptsmith.engine.sampling import SAMPLING_OPTIONS, GenerationOptions, Range, SamplingOptions, SamplingParams
from gptsmith.errors import UsageError


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 2.0},
        {"top_p": 0.0},
        {"top_k": 0},
        {"min_p": -0.1},
        {"typical_p": 0.0},
        {"max_tokens": 0},
        {"min_tokens": 3, "max_tokens": 2},
        {"repetition_penalty": 0.0},
        {"presence_penalty": float("nan")},
        {"frequency_penalty": 1e9},
        {"logit_bias": {1: float("nan")}},
        {"logit_bias": {1: float("inf")}},
        {"stop": ("",)},
        {"stop": "abc"},
        {"stop_ids": ("a",)},
        {"logit_bias": {"1": 2.0}},
        {"logit_bias": {1: "2"}},
        {"stop": (3,)},
        {"max_tokens": "5"},
        {"max_tokens": None},
        {"max_tokens": 2.5},
        {"n": True},
        {"seed": "x"},
        {"temperature": "hot"},
        {"top_p": "0.9"},
        {"n": 0},
        {"best_of": 1, "n": 2},
        {"best_of": 3, "temperature": 0.0},
        {"beams": 0},
        {"temperature": 0.5, "beams": 2},
        {"n": 3, "beams": 2, "temperature": 0.0},
        {"logprobs": -1},
        {"prompt_logprobs": -1},
        {"overflow": "explode"},
        {"length_penalty": float("nan")},
    ],
)
def test_values_out_of_range_or_contradictory_are_usage_errors(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong)).replace("_", "-")):
        SamplingParams(**wrong)  # type: ignore[arg-type]


def test_infinite_and_nan_numbers_are_named_as_such() -> None:
    with pytest.raises(UsageError, match="--temperature must be a finite number, not inf"):
        SamplingParams(temperature=float("inf"))
    with pytest.raises(UsageError, match="--top-p must be above 0 and at most 1, not 2.0"):
        SamplingParams(top_p=2.0)


def test_params_from_options() -> None:
    options = GenerationOptions(temperature=0.5, top_k=3, stop=("x",))
    params = SamplingParams.from_options(options, n=2, seed=7)
    assert params == SamplingParams(temperature=0.5, top_k=3, stop=("x",), n=2, seed=7)
    assert SamplingParams.from_options(SamplingOptions()) == SamplingParams()
    with pytest.raises(UsageError, match="top-k"):
        SamplingParams.from_options(SamplingOptions(top_k=0))


def test_every_option_has_a_help_text_and_a_default_within_its_ranges() -> None:
    others = {"constraint", "stop_condition"}  # objects, for programs
    assert SAMPLING_OPTIONS.keys() | others == {each.name for each in fields(SamplingParams)}
    for name, option in SAMPLING_OPTIONS.items():
        assert option.help.endswith("."), name
        value = getattr(SamplingParams(), name)
        if isinstance(value, int | float):
            assert value in option.range, name
            assert value in option.request_range, name


def test_ranges() -> None:
    unit = Range(gt=0, le=1)
    assert [value in unit for value in (0, 0.5, 1, 1.1)] == [False, True, True, False]
    assert unit.limits() == {"gt": 0, "le": 1}
    assert [str(each) for each in (unit, Range(ge=1), Range())] == ["above 0 and at most 1", "at least 1", "a number"]


def test_options_can_be_read_without_torch() -> None:
    code = "import sys, gptsmith.engine.sampling; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
