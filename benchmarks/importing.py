"""What does ``import lightning_easier`` cost beside ``import lightning``?

Both are imported in fresh processes, in turn. Seconds of the processor are compared, too: those that the machine spends
on other work are not among them. The modules that each imports are counted:

    python benchmarks/importing.py --pairs 10
"""

import argparse
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from statistics import median, quantiles
from typing import NamedTuple

from lightning_easier.report import Table

STATEMENTS = {"lightning": "import lightning", "lightning_easier": "import lightning_easier"}
# As after an installation: bytecode is written by the first import of each, and read by the others
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
COUNT = "import sys; known = set(sys.modules); {}; print(len(set(sys.modules) - known))"


class Seconds(NamedTuple):
    """What one process took.

    Attributes:
        clock: From its start to its end.
        processor: Of all cores together.
    """

    clock: float
    processor: float


def run(statement: str) -> Seconds:
    """Run a statement in a fresh process."""
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True, capture_output=True, env=ENVIRONMENT)
    clock, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    return Seconds(clock, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def modules(statement: str) -> int:
    """Return how many modules a statement imports."""
    given = [sys.executable, "-c", COUNT.format(statement)]
    done = subprocess.run(given, check=True, capture_output=True, text=True, env=ENVIRONMENT)
    return int(done.stdout.split()[-1])


def main(arguments: Sequence[str] | None = None) -> None:
    """Time, and print a table."""
    parser = argparse.ArgumentParser(description="Time the import of the package beside that of Lightning.")
    parser.add_argument("--pairs", type=int, default=10, help="how often each is imported")
    pairs = parser.parse_args(arguments).pairs
    if pairs < 2:
        parser.error(f"Expected argument `--pairs` to be at least 2, for quartiles, but got {pairs}")
    taken: dict[str, list[Seconds]] = {name: [] for name in STATEMENTS}
    for statement in STATEMENTS.values():
        run(statement)
    for _ in range(pairs):
        for name, statement in STATEMENTS.items():
            taken[name].append(run(statement))
    rows = []
    for name, seconds in taken.items():
        row = [name, str(modules(STATEMENTS[name]))]
        for kind in Seconds._fields:
            values = [getattr(each, kind) for each in seconds]
            ratios = [v / getattr(each, kind) for v, each in zip(values, taken["lightning"], strict=True)]
            low, _, high = quantiles(ratios, n=4)
            row += [f"{median(values):.2f}", f"{median(ratios):.3f} ({low:.3f}–{high:.3f})"]
        rows.append(row)
    columns = ["import", "modules", "seconds", "beside lightning", "of the processor", "beside lightning"]
    print(Table("The import of the package beside that of Lightning", columns, rows).to_markdown())


if __name__ == "__main__":
    main()
