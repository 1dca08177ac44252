"""Measure pdrs beside torch, dict and OrderedDict, and write tables and pictures.

``python benchmarks/run.py`` takes most of an hour. A suite that is measured whole, at the usual sizes, replaces its
part of ``benchmarks/results``, of a page of ``docs`` and of the README. Any other run prints its tables, and
writes them if told where.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import re
import shlex
import sys
from pathlib import Path
from time import monotonic
from typing import Any

from machine import describe
from measure import Measurement, Suite, measure
from report import Results, claims_table, replace_block, report, short_table, summary, verdicts

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
README = HERE.parent / "README.md"
DOCS = HERE.parent / "docs"
# Each lies in a module `cases_NAME`, which is imported only if it is measured: a machine may lack what others need.
SUITES = (
    "parameter_dict",
    "training",
    "stacked",
    "transfer",
    "checkpoint",
    "serving",
    "distributed",
    "index_map",
    "gpu",
)
SIZES = (10_000, 100_000, 1_000_000)
QUICK_SIZES = (1_000,)
REPEATS = 5


def main(arguments: list[str]) -> None:
    """Do what the command line asks for."""
    options = _parse(arguments)
    if options.report:
        for name in SUITES:
            stored = RESULTS / f"{name}.json"
            if stored.exists():
                _publish(Results.load(stored), _suite(name))
        _publish_claims()
        return
    complete = options.sizes == SIZES and not options.only
    measured = False
    # The collector would run at any time, in whosever turn it was.
    gc.disable()
    for name in SUITES:
        if options.suite not in (None, name):
            continue
        suite = _suite(name)
        results = _measure(suite, options)
        if not results.measurements:
            continue
        measured = True
        print(report(results, suite))
        if verdicts(results, suite):
            print(summary(results, suite), end="\n\n")
        if options.output:
            _write(results, suite, options.output)
        elif complete:
            _publish(results, suite)
            _publish_claims()
    if not measured:
        what = f"no case matches {options.only!r}" if options.only else "this machine lacks what the cases need"
        raise SystemExit(what)


def _suite(name: str) -> Suite[Any]:
    suite: Suite[Any] = importlib.import_module(f"cases_{name}").SUITE
    return suite


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=_sizes, default=SIZES, help="numbers of entries, with commas between")
    parser.add_argument(
        "--repeats", type=_positive, default=REPEATS, help="the most runs of each case (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="one run at 1,000 entries, to see that everything works")
    parser.add_argument("--suite", choices=SUITES, help="only this table")
    parser.add_argument("--only", metavar="PATTERN", default="", help="only cases whose title matches, as a regex")
    parser.add_argument(
        "--seconds", type=_positive, help="begin no case after so many seconds; small sizes are measured first"
    )
    parser.add_argument("--output", metavar="FOLDER", type=Path, help="write tables and figures there instead")
    parser.add_argument("--report", action="store_true", help="measure nothing; write the last results out again")
    options = parser.parse_args(arguments)
    if options.quick:
        options.sizes, options.repeats = QUICK_SIZES, 1
    return options


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(sorted({_positive(part) for part in text.split(",")}))


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def _measure(suite: Suite[Any], options: argparse.Namespace) -> Results:
    pattern = re.compile(options.only, re.IGNORECASE)
    measured: list[Measurement] = []
    begun = monotonic()
    for of_case in measure(suite, options.sizes, options.repeats, pattern):
        measured += of_case
        if options.seconds is not None and monotonic() - begun > options.seconds:
            print(f"{suite.title}: stopped after {options.seconds} seconds", file=sys.stderr)
            break
    return Results(describe(_command(options)), options.sizes, tuple(measured))


def _command(options: argparse.Namespace) -> str:
    """Give the command that measures the same again."""
    words = ["python benchmarks/run.py"]
    if options.quick:
        words.append("--quick")
    else:
        if options.sizes != SIZES:
            words.append(f"--sizes {','.join(map(str, options.sizes))}")
        if options.repeats != REPEATS:
            words.append(f"--repeats {options.repeats}")
    if options.suite:
        words.append(f"--suite {options.suite}")
    if options.seconds:
        words.append(f"--seconds {options.seconds}")
    if options.only:
        words.append(f"--only {shlex.quote(options.only)}")
    return " ".join(words)


def _write(results: Results, suite: Suite[Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    results.save(folder / f"{suite.name}.json")
    (folder / f"{suite.name}.md").write_text(report(results, suite), encoding="utf-8")
    if suite.marker:
        import plot  # which needs matplotlib

        if suite.name in plot.PICTURES:
            plot.draw(results, suite, folder / f"{suite.name}.png")


def _publish(results: Results, suite: Suite[Any]) -> None:
    _write(results, suite, RESULTS)
    if suite.marker:
        replace_block(DOCS / suite.page, suite.marker, short_table(results, suite))
    for marker, write in suite.blocks.items():
        replace_block(DOCS / suite.page, marker, write(results))


def _publish_claims() -> None:
    """Write the table of the README, which has rows of several suites, from the last results of each."""
    suites = [(path, _suite(name)) for name in SUITES if (path := RESULTS / f"{name}.json").exists()]
    claimed = [(Results.load(path), suite) for path, suite in suites if suite.claims]
    # What is compared with one tensor comes first.
    claimed.sort(key=lambda pair: not any(claim.together for claim in pair[1].claims))
    replace_block(README, "benchmark-claims", claims_table(claimed))


if __name__ == "__main__":
    main(sys.argv[1:])
