"""How quickly the command line answers: python benchmarks/startup.py [--save]

CPU seconds (user and system) of `gptsmith --help`, `gptsmith train --help` and `import gptsmith`, the median of five.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys

import machine

COMMANDS = {
    "gptsmith --help": ["-m", "gptsmith", "--help"],
    "gptsmith train --help": ["-m", "gptsmith", "train", "--help"],
    "import gptsmith": ["-c", "import gptsmith"],
}


def cpu_seconds(arguments: list[str]) -> float:
    def used() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = used()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return used() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/startup.json")
    arguments = parser.parse_args()
    result = {name: round(statistics.median(cpu_seconds(a) for _ in range(5)), 3) for name, a in COMMANDS.items()}
    print(result)
    if arguments.save:
        print(machine.save("startup", result))


if __name__ == "__main__":
    main()
