"""Seconds that `bloodcell --help` takes, against importing fastai.

python benchmarks/startup.py
"""

import subprocess
import sys
from pathlib import Path

from common import in_turn, machine, seconds

COMMANDS = {
    "import fastai.vision.all": [sys.executable, "-c", "from fastai.vision.all import *"],
    "bloodcell --help": [str(Path(sys.executable).with_name("bloodcell")), "--help"],
}


def main() -> None:
    cases = {
        name: lambda command=command: seconds(
            lambda: subprocess.run(command, check=True, capture_output=True)
        )
        for name, command in COMMANDS.items()
    }
    medians = in_turn(cases, repeats=5)
    theirs, ours = medians.values()
    print(f"\n{machine()}")
    print(f"import fastai {theirs:.2f} s, --help {ours:.2f} s: 1/{theirs / ours:.1f} of it")


if __name__ == "__main__":
    main()
