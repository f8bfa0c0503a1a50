"""Hand odd input to every door of the package, and count what does not end as it should.

    python tools/fuzz.py [--kinds pictures,settings] [--cases N] [--seed S] [--json]
    python tools/fuzz.py --kinds pictures --only 1234     the one case again, with its traceback

A case must end as asked or in a LlamaVisionError. It fails with a foreign exception, by taking more
than 5 seconds or 1 GiB, by a message that is long, of several lines or has raw control characters,
by what it, a warning or a C library writes to stderr, by starting a program, or by taking what is
known to be wrong. Cases are the same for the same seed; each runs in a process that may die.
"""

import argparse
import json
import sys
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parent))

from fuzzing.judge import Case, Kind, Outcome, judge
from fuzzing.kinds import KINDS
from fuzzing.runner import run

SHOWN = 5
"""Failing cases of each group that the table lists."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The table; the exit code is 1 where a case failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"of {', '.join(KINDS)}")
    parser.add_argument("--cases", type=int, help="of each kind; spread over all that there are")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="I", help="one case, in this process")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    options = parser.parse_args(arguments)
    failed, report = False, {}
    with TemporaryDirectory() as scratch:
        for name in options.kinds.split(","):
            folder = Path(scratch) / name
            folder.mkdir()
            kind = KINDS[name](options.seed, folder)
            if options.only is not None:
                return show(kind.case(options.only), options.only)
            outcomes = try_kind(kind, options.cases, options.workers)
            report[name] = summary(outcomes)
            failed |= bool(report[name]["failing"])
            print_summary(name, report[name])
    print_table(report)
    if options.json:
        print(json.dumps({"seed": options.seed, "kinds": report}))
    return int(failed)


def spread(kind: Kind, cases: int | None) -> range:
    """Numbers of so many cases, evenly over all of them; of more than there are, more are drawn."""
    if cases is None or cases >= kind.cases:
        drawn = kind.name in ("pictures", "checkpoints") and cases is not None
        return range(cases if drawn else kind.cases)
    return range(0, kind.cases, -(-kind.cases // cases)) if cases else range(0)


def try_kind(kind: Kind, cases: int | None, workers: int) -> list[Outcome]:
    """All outcomes, in the order of the cases."""
    outcomes, numbers = [], spread(kind, cases)
    for outcome in run(kind, numbers, workers=workers):
        outcomes.append(outcome)
        if len(outcomes) % 500 == 0:
            print(f"{kind.name}: {len(outcomes)} of {len(numbers)}", file=sys.stderr)
    return sorted(outcomes, key=lambda outcome: outcome.number)


def summary(outcomes: list[Outcome]) -> dict:
    """Counts, and the failing cases grouped by what went wrong where."""
    groups: dict[tuple[str, str, str], list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.faults:
            what = outcome.faults[0].partition(":")[0]
            groups.setdefault((what, outcome.ended, outcome.where), []).append(outcome)
    return {
        "tried": len(outcomes),
        "failing": sum(map(len, groups.values())),
        "ended": Counter(outcome.ended for outcome in outcomes),
        "faults": Counter(f.partition(":")[0] for o in outcomes for f in o.faults),
        "groups": [
            {
                "fault": what,
                "ended": ended,
                "where": where,
                "cases": len(group),
                "first": [
                    {"number": o.number, "words": o.words, "faults": o.faults}
                    for o in group[:SHOWN]
                ],
            }
            for (what, ended, where), group in sorted(groups.items(), key=lambda g: -len(g[1]))
        ],
    }


def print_summary(name: str, found: dict) -> None:
    """The groups of failing cases of one kind."""
    for group in found["groups"]:
        print(f"\n{name}: {group['cases']} × {group['fault']}, {group['ended']} {group['where']}")
        for one in group["first"]:
            print(f"  {one['number']:>6}  {one['words']}\n          {'; '.join(one['faults'])}")


def print_table(report: dict) -> None:
    """Kind by kind: tried, failing, and how the cases ended."""
    print(f"\n{'kind':12} {'tried':>7} {'failing':>8} {'taken':>7} {'refused':>8}")
    for name, found in report.items():
        ended = found["ended"]
        row = (found["tried"], found["failing"], ended["taken"], ended["refused"])
        print(f"{name:12} {row[0]:>7} {row[1]:>8} {row[2]:>7} {row[3]:>8}")


def show(case: Case, number: int) -> int:
    """One case: its outcome, then the whole traceback of running it without a watch."""
    outcome = judge(case, number)
    print(outcome)
    if outcome.faults:
        try:
            case.run()
        except BaseException:
            traceback.print_exc()
    return int(bool(outcome.faults))


if __name__ == "__main__":
    sys.exit(main())
