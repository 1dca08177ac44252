"""Tables in Markdown: for the terminal, for files, the short ones of docs, and that of the README."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from measure import Case, Claim, Measurement, Suite, Target, all_sizes

TIMES = "\N{MULTIPLICATION SIGN}"
NONE = "\N{EN DASH}"


@dataclass(frozen=True)
class Results:
    """All figures of a run, and what they were measured with."""

    machine: dict[str, str]
    sizes: tuple[int, ...]
    measurements: tuple[Measurement, ...]

    def median(self, suite: Suite[Any], case: Case[Any], subject: str, entries: int) -> float | None:
        """Return the median of a cell of the table, or None if it was not measured."""
        found = self._find(suite, case, subject, entries)
        return None if found is None else found.median

    def growth(self, suite: Suite[Any], case: Case[Any], subject: str, entries: int) -> float | None:
        """Return how many times what it costs at the smallest size an entry costs, or None if it was not measured."""
        small, large = (self._find(suite, case, subject, size) for size in (self.sizes[0], entries))
        if small is None or large is None:
            return None
        return large.median / small.median if large.growth is None else large.growth

    def runs(self, suite: Suite[Any], case: Case[Any], entries: int) -> int:
        """Return how often a case ran for ours, or, if it is not for ours, for the last of the others."""
        found = (self._find(suite, case, subject, entries) for subject in reversed(suite.subjects))
        return next((len(each.runs) for each in found if each is not None), 0)

    def has(self, suite: Suite[Any]) -> bool:
        """Tell whether anything of a suite was measured."""
        return any(each.suite == suite.name for each in self.measurements)

    def _find(self, suite: Suite[Any], case: Case[Any], subject: str, entries: int) -> Measurement | None:
        wanted = (suite.name, case.title, subject, entries)
        for each in self.measurements:
            if (each.suite, each.case, each.subject, each.entries) == wanted:
                return each
        return None

    def save(self, path: Path) -> None:
        """Write everything as JSON, a measurement a line."""
        lines = [
            json.dumps({name: value for name, value in asdict(each).items() if value != ()} | {"median": each.median})
            for each in self.measurements
        ]
        machine = json.dumps(self.machine, indent=2, ensure_ascii=False)
        body = ",\n".join(lines)
        text = f'{{"machine": {machine},\n"sizes": {list(self.sizes)},\n"measurements": [\n{body}\n]}}\n'
        path.write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read what ``save`` wrote."""
        stored = json.loads(path.read_text(encoding="utf-8"))
        measurements = []
        for each in stored["measurements"]:
            del each["median"]
            runs = {name: tuple(value) for name, value in each.items() if isinstance(value, list)}
            measurements.append(Measurement(**{**each, **runs}))
        return cls(stored["machine"], tuple(stored["sizes"]), tuple(measurements))


def report(results: Results, suite: Suite[Any]) -> str:
    """Write the whole report of a suite."""
    sizes = results.sizes
    sections = [
        f"# {suite.title}",
        f"{suite.intro} Figures are medians, in nanoseconds per entry or call (of memory, bytes per entry);"
        f" {suite.turns}.",
        _machine_list(results.machine),
        _growth_sentences(results, suite) if len(sizes) > 1 else "",
        *(_section(results, suite, entries) for entries in reversed(all_sizes(suite.cases, sizes))),
        _notes(results, suite),
        suite.appendix(results) if suite.appendix is not None else "",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def replace_block(path: Path, marker: str, block: str) -> None:
    """Replace what stands between ``<!-- marker:begin -->`` and ``<!-- marker:end -->``."""
    text = path.read_text(encoding="utf-8")
    before, begin, rest = text.partition(f"<!-- {marker}:begin -->")
    _, end, after = rest.partition(f"<!-- {marker}:end -->")
    if not (begin and end):
        raise ValueError(f"{path.name} has no place for {marker}")
    path.write_text(f"{before}{begin}\n{block}\n{end}{after}", encoding="utf-8")


def short_table(results: Results, suite: Suite[Any]) -> str:
    """Write the short table: at the largest size, or at the largest that was not too slow for the baseline."""
    entries = results.sizes[-1]
    baselines = [each for each in suite.baselines if _required(suite, each)]
    rows = []
    for case in suite.cases:
        against = {target.baseline for target in case.targets if target.kind != "growth"}
        if not against:
            continue
        size = min(case.largest(entries, baseline) for baseline in against)
        medians = {each: results.median(suite, case, each, size) for each in [*baselines, suite.ours]}
        ours = medians[suite.ours]
        if ours is None or any(medians[baseline] is None for baseline in against):
            raise ValueError(f"{case.title} was not measured at {size:,} entries")
        title = case.title if size == entries else f"{case.title} ({size:,} entries)"
        ratios = [medians[baseline] for baseline in baselines]
        rows.append(
            [
                title,
                *(NONE if each is None else _with_unit(each, case) for each in medians.values()),
                *(NONE if each is None else f"{figure(each / ours)}{TIMES}" for each in ratios),
            ]
        )
    machine = results.machine
    head = (
        f"{entries:,} entries, per entry or call: medians, garbage collector off. {machine['CPU']},"
        f" {machine['memory']}, {machine['OS']}; Python {machine['Python']}, torch {machine['torch']}."
        f" Measured with `{machine['command']}`."
    )
    ratio_heads = [f"{baseline} / {suite.ours}" for baseline in baselines]
    return f"{head}\n\n" + table(["", *baselines, suite.ours, *ratio_heads], rows)


def claims_table(claimed: Sequence[tuple[Results, Suite[Any]]]) -> str:
    """Write the table of the README: what some cases of several suites cost at the largest size, in seconds."""
    rows, machines = [], []
    for results, suite in claimed:
        entries = results.sizes[-1]
        machines.append(results.machine)
        for claim in suite.claims:
            subjects = (suite.ours, claim.together, claim.apart)
            rows.append([claim.words, *(_claimed(results, suite, claim, subject) for subject in subjects)])
    of_all = {f"{each['CPU']}, Python {each['Python']}, torch {each['torch']}" for each in machines}
    commands = [each["command"].removeprefix("python benchmarks/run.py ") for each in machines]
    (entries,) = {results.sizes[-1] for results, _ in claimed}
    head = [f"with {entries:,} names", "pdrs", "one tensor or file", "a tensor for each name"]
    return (
        f"{table(head, rows)}\n\nMedians on a CPU: {'; '.join(sorted(of_all))}. Measured with"
        f" `python benchmarks/run.py`, with {' and '.join(f'`{each}`' for each in commands)}."
    )


def _claimed(results: Results, suite: Suite[Any], claim: Claim, subject: str) -> str:
    """Write what a container costs, at the largest size that its case measures; which, if it is a smaller one."""
    if not subject:
        return NONE
    case = next(case for case in suite.cases if case.title == claim.title)
    entries = results.sizes[-1]
    size = case.largest(entries, subject)
    median = results.median(suite, case, subject, size)
    if median is None:
        raise ValueError(f"{claim.title} was not measured at {size:,} entries")
    text = _seconds(median * (claim.names or size) * 1e-9)
    return text if size == entries else f"{text} ({size:,} names)"


def _seconds(value: float) -> str:
    """Write seconds with a unit that suits them."""
    factor, unit = next(
        each for each in ((1, "s"), (1e3, "ms"), (1e6, "µs"), (1e9, "ns")) if value * each[0] >= 1 or each[1] == "ns"
    )
    return f"{figure(value * factor)} {unit}"


def _required(suite: Suite[Any], baseline: str) -> bool:
    """Whether anything is required of a suite beside a container."""
    return any(target.baseline == baseline for case in suite.cases for target in case.targets)


def verdicts(results: Results, suite: Suite[Any]) -> list[tuple[Case[Any], Target, bool]]:
    """Judge all requirements for which both figures were measured."""
    judged = []
    for case in suite.cases:
        for target in case.targets:
            if target.kind == "growth":
                growth = results.growth(suite, case, suite.ours, target.entries)
                if growth is not None:
                    judged.append((case, target, target.met(1, growth)))
                continue
            theirs = results.median(suite, case, target.baseline, target.entries)
            ours = results.median(suite, case, suite.ours, target.entries)
            if theirs is not None and ours is not None:
                judged.append((case, target, target.met(theirs, ours)))
    return judged


def summary(results: Results, suite: Suite[Any]) -> str:
    """Say how many requirements are met, and which are not."""
    judged = verdicts(results, suite)
    missed = [f"{case.title}, {_against(target)}" for case, target, met in judged if not met]
    text = f"{suite.title}: {len(judged) - len(missed)} of {len(judged)} required figures are met"
    return f"{text}; not: {', '.join(missed)}" if missed else text


def figure(value: float | None) -> str:
    """Write a number with three significant digits."""
    if value is None:
        return NONE
    rounded = float(f"{value:.3g}")
    if rounded >= 100:
        return f"{rounded:,.0f}"
    return f"{rounded:#.3g}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a Markdown table whose columns are as wide as their cells."""
    cells = [list(head), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [
        " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
        for row in [cells[0], rule, *cells[1:]]
    ]
    return "\n".join(f"| {line} |" for line in lines)


def _growth_sentences(results: Results, suite: Suite[Any]) -> str:
    text = f"Growth is the cost per entry over that at {results.sizes[0]:,} entries."
    if any(case.beside_smallest for case in suite.cases):
        text += " Where it is required, these were measured again, in turns with the larger size."
    return f"{text} A dict's own growth shows what memory costs that no longer fits into the caches."


def _machine_list(machine: dict[str, str]) -> str:
    return "\n".join(
        f"- {key}: `{value}`" if key == "command" else f"- {key}: {value}" for key, value in machine.items()
    )


def _section(results: Results, suite: Suite[Any], entries: int) -> str:
    # A container that was not measured at this size has no column.
    present = {each.subject for each in results.measurements if (each.suite, each.entries) == (suite.name, entries)}
    if suite.ours not in present:
        return ""
    suite = replace(
        suite,
        subjects=tuple(subject for subject in suite.subjects if subject in present),
        baselines=tuple(baseline for baseline in suite.baselines if baseline in present),
    )
    rows = [row for case in suite.cases if (row := _row(results, suite, case, entries))]
    return f"## {entries:,} entries\n\n" + table(_head(suite, _grows(results, suite, entries)), rows)


def _head(suite: Suite[Any], grows: bool) -> list[str]:
    head = ["", *suite.subjects]
    for baseline in suite.baselines:
        head += [f"{baseline} / {suite.ours}", "at least", "met"]
    head.append("runs")
    if grows:
        head += [*(f"growth {subject}" for subject in suite.subjects), f"≤ {suite.growth_at_most:g}"]
    return head


def _row(results: Results, suite: Suite[Any], case: Case[Any], entries: int) -> list[str]:
    medians = {subject: results.median(suite, case, subject, entries) for subject in suite.subjects}
    ours = medians[suite.ours]
    if not any(medians.values()):
        return []
    row = [case.title, *(NONE if each is None else _with_unit(each, case) for each in medians.values())]
    for baseline in suite.baselines:
        theirs = medians[baseline]
        row.append(NONE if theirs is None or ours is None else figure(theirs / ours))
        # What is required of ours alone stands beside the first of the others.
        beside = (baseline, suite.ours) if baseline == suite.baselines[0] else (baseline,)
        targets = [each for each in case.targets if each.entries == entries and each.kind != "growth"]
        target = next((each for each in targets if each.baseline in beside), None)
        measured = None if target is None else medians[target.baseline]
        row += (
            ["", ""]
            if target is None or measured is None or ours is None
            else [_bound(target), _yes(target.met(measured, ours))]
        )
    row.append(str(results.runs(suite, case, entries)))
    if _grows(results, suite, entries):
        row += _growth_cells(results, suite, case, entries)
    return row


def _grows(results: Results, suite: Suite[Any], entries: int) -> bool:
    sizes = results.sizes
    return len(sizes) > 1 and entries >= sizes[-1]


def _growth_cells(results: Results, suite: Suite[Any], case: Case[Any], entries: int) -> list[str]:
    growths = [results.growth(suite, case, subject, entries) for subject in suite.subjects]
    ours = growths[-1]
    return [*map(figure, growths), NONE if ours is None else _yes(ours <= suite.growth_at_most)]


def _against(target: Target) -> str:
    return "growth" if target.kind == "growth" else f"against {target.baseline}"


def _bound(target: Target) -> str:
    bound = f"{target.bound:g}"
    if target.kind == "beyond":
        return f"≤ {target.baseline} + {bound} B"
    return f"≤ {bound} B" if target.kind == "total" else bound


def _with_unit(value: float, case: Case[Any]) -> str:
    if case.unit == "ns" and value >= 1e6:
        return _seconds(value * 1e-9)
    return f"{figure(value)} {case.unit}"


def _yes(met: bool) -> str:
    return "yes" if met else "**no**"


def _notes(results: Results, suite: Suite[Any]) -> str:
    measured = {each.case for each in results.measurements if each.suite == suite.name}
    notes = [f"- {case.title}: {case.note}" for case in suite.cases if case.note and case.title in measured]
    if not notes:
        return ""
    return "\n".join(["## Notes", "", *notes])
