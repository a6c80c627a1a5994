"""Fit the fractions of the hardware files on published runs: python benchmarks/cluster/calibrate.py [--write]

Least squares over the runs that runs.csv marks with `fit`: llm-foundry's on 8 A100 80 GB or H100 with contexts of 2,048
and 32,768, and torchtitan's on 8 H100 of 500 W. All others are left for check.py. Needs scipy.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from published import runs
from scipy.optimize import least_squares

from gptsmith.train.forecast import cluster
from gptsmith.train.forecast.cluster import Hardware, load_hardware

FOLDER = Path(cluster.__file__).parent / "hardware"
BOUNDS = {"matmul": (0.2, 1), "attention": (0.1, 1), "traffic": (0.2, 0.95), "links": (0.2, 1), "overlap": (0, 1.5)}
# Hardware -> (fractions to fit, hardware to take the others from, what the result rests on)
PLAN: dict[str, tuple[list[str], str | None, str]] = {
    "a100-80": (list(BOUNDS), None, "llm-foundry, 8 A100 80 GB, contexts 2,048 and 32,768"),
    "a100-40": ([], "a100-80", "those of `a100-80`"),
    "h100": (list(BOUNDS), None, "llm-foundry, 8 H100, contexts 2,048 and 32,768"),
    "h100-96": (["matmul", "attention", "traffic"], "h100", "torchtitan, 8 H100 of 500 W; links and overlap of `h100`"),
    "h200": ([], "h100", "those of `h100`"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="change the files")
    arguments = parser.parse_args()
    fitted: dict[str, Hardware] = {}
    for name, (keys, other, rests_on) in PLAN.items():
        hardware = load_hardware(name)
        if other is not None:
            hardware = replace(hardware, **{key: getattr(fitted[other], key) for key in BOUNDS if key not in keys})
        fitted[name] = hardware = fit(hardware, keys) if keys else hardware
        print(name, {key: round(getattr(hardware, key), 3) for key in BOUNDS})
        if arguments.write:
            path = FOLDER / f"{name}.yaml"
            text = path.read_text(encoding="utf-8")
            for key in BOUNDS:
                text = re.sub(rf"^{key}: .*$", f"{key}: {getattr(hardware, key):.3f}", text, flags=re.M)
            text = re.sub(r"^rests_on: .*$", f'rests_on: "{rests_on}"', text, flags=re.M)
            path.write_text(text, encoding="utf-8")


def fit(hardware: Hardware, keys: list[str]) -> Hardware:
    """Return the hardware with the fractions that fit its calibration runs best."""
    chosen = [run for run in runs() if run.hardware == hardware.name and run.use == "fit"]

    def errors(values: np.ndarray) -> np.ndarray:
        fractions: dict[str, Any] = dict(zip(keys, map(float, values), strict=True))
        tried = replace(hardware, **fractions)
        return np.log1p([run.errors(tried)[0] for run in chosen])

    lowest, highest = zip(*(BOUNDS[key] for key in keys), strict=True)
    start = [(BOUNDS[key][0] + BOUNDS[key][1]) / 2 for key in keys]
    found = least_squares(errors, start, bounds=(lowest, highest), loss="soft_l1", f_scale=0.05)
    best: dict[str, Any] = dict(zip(keys, map(float, found.x), strict=True))
    return replace(hardware, **best)


if __name__ == "__main__":
    main()
