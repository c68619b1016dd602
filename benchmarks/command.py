"""The command line of the benchmarks: ``python -m benchmarks [part ...]``; see docs/benchmarks.md."""

import argparse
import math
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import rich
import torch
from answers import PARTS, Setting, answers
from children import ChildError, in_child, start_from_nothing
from questions import EFFORTS
from results import Results, machine, read, slower, versions

BY_DEFAULT = ("measuring", "scale", "rounds", "collapsing", "fitting", "runtimes")
ON_A_GPU = ("measuring", "collapsing", "large", "rounds", "runtimes", "curve")
"""What part ``gpu`` stands for."""
_LIMITS = {"full": None, "quick": 120.0, "dry": 300.0}
_PROFILED = ("measuring", "compress")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write one table; return 1 if something failed or has become slower."""
    options, others = _parser().parse_known_args(arguments)
    effort = "dry" if options.dry else "quick" if options.quick else "full"
    parts = _parts(options.parts, others)
    if options.compare is not None and not options.compare.exists():
        _parser().error(f"--compare {options.compare}: there is no such file")
    old = None if options.compare is None else read(options.compare)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what runs in other processes ends, too
    try:
        results = Results(options.output, _machine(options.device), versions())
        limit = options.limit or _LIMITS[effort]
        is_whole = True
        for part in parts:
            setting = Setting(part, options.device, options.threads, effort, limit)
            is_whole &= _measured(setting, results, others)
    finally:
        signal.signal(signal.SIGTERM, before)
    print(results.to_markdown() if results.measurements else "\n\n".join(results.tables.values()))
    if old is None:
        return int(not is_whole)
    table = slower(results, old)
    rich.print(table)
    return int(not is_whole or bool(table.rows))


def _measured(setting: Setting, results: Results, others: Sequence[str]) -> bool:
    """Measure a part and note it as it comes; tell whether all of it could be measured."""
    if setting.part not in PARTS:
        return _with_table(setting, results, others)
    is_whole, began = True, time.monotonic()
    for measured in answers(setting):
        results.add(measured)
        is_whole &= not any(each.failure for each in measured)
        took, began = time.monotonic() - began, time.monotonic()
        first = measured[0]
        print(f"{first.question}: {first.case}: {first.failure or f'{took:.1f} s'}", file=sys.stderr, flush=True)
    return is_whole


def _machine(device: str) -> dict[str, Any]:
    try:
        return in_child(machine, device)
    except ChildError:
        if device == "cpu":
            raise
        start_from_nothing()
        return in_child(machine, device)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, allow_abbrev=False)
    known = [*PARTS, "curve", "tuning", "gpu", "profile"]
    parser.add_argument("parts", nargs="*", help=f"some of {', '.join(known)}; {', '.join(BY_DEFAULT)} by default")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="smaller, about five minutes on two cores")
    size.add_argument("--dry", action="store_true", help="tiny, to see that everything runs")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="of torch; as many as it takes by default"
    )
    parser.add_argument("--output", type=Path, help="folder of results.md and results.json; what is there is kept")
    parser.add_argument(
        "--compare", type=Path, help="an earlier results.json; what is slower by more than the spread is told"
    )
    parser.add_argument("--limit", type=float, help="seconds after which a case is stopped; 120 with --quick")
    return parser


def _parts(given: Sequence[str], others: Sequence[str]) -> list[str]:
    """Return the parts; what is to be profiled is one of its own."""
    if given[:1] == ["profile"]:
        if (what := " ".join(given[1:])) not in _PROFILED:
            _parser().error(f"expected `profile` to be followed by one of {', '.join(_PROFILED)}, but got {what!r}")
        return [f"profile {what}"]
    parts = list(given) or list(BY_DEFAULT)
    if "gpu" in parts:
        place = parts.index("gpu")
        parts[place : place + 1] = [part for part in ON_A_GPU if part not in parts]
    known = [*PARTS, "curve", "tuning"]
    if unknown := [part for part in parts if part not in known]:
        _parser().error(f"expected parts to be some of {', '.join(known)}, gpu, profile, but got {unknown}")
    if others and "tuning" not in parts:
        _parser().error(f"unrecognized arguments: {' '.join(others)}")
    return parts


def _with_table(setting: Setting, results: Results, others: Sequence[str]) -> bool:
    """Run what makes a table of its own, and note what it has told until it is done or fails; tell which of both."""
    part, _, what = setting.part.partition(" ")
    function = {"tuning": tune, "curve": follow, "profile": profile}[part]
    argument = list(others) if part == "tuning" else what
    tell = partial(results.add_table, setting.part)
    try:
        in_child(function, setting, argument, seconds=setting.seconds, tell=tell)
    except ChildError as error:
        tell("\n\n".join([*filter(None, [results.tables.get(setting.part)]), f"{setting.part} failed: {error}"]))
        return False
    return True


Tell = Callable[[str], Any]


def tune(setting: Setting, arguments: list[str], tell: Tell) -> None:
    """Run ``tuning.py``, and tell what it prints."""
    setting.prepare()
    from tuned import run, run_dry

    tell(run_dry() if setting.effort == "dry" and not arguments else run(arguments))


def follow(setting: Setting, _: str, tell: Tell) -> None:
    """Tell EASIER's curve as it grows, as far as it comes before it would be stopped."""
    from curve import run

    seconds = math.inf if setting.seconds is None else 0.8 * setting.seconds  # the images are made before
    run(EFFORTS[setting.effort], setting.prepare(), lambda table: tell(table.to_markdown()), seconds)


def profile(setting: Setting, what: str, tell: Tell) -> None:
    """Tell where the time goes."""
    from hotspots import hot_spots

    tell(hot_spots(what, EFFORTS[setting.effort], setting.prepare()).to_markdown())
