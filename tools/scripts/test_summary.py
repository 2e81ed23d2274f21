#!/usr/bin/env python3
"""Sums up a test run: what failed, what was skipped and why, and one closing line of counts.

Usage: test_summary.py CTEST_JUNIT GTEST_FOLDER. A program with a GoogleTest report counts by its
cases; any other, and one that died before it could report, counts as one.
"""

import pathlib
import sys
import xml.etree.ElementTree as xml


def gtest_cases(report):
    """Yields (name, "passed" | "failed" | "skipped", reason)."""
    for case in xml.parse(report).getroot().iter("testcase"):
        name = f"{report.stem} {case.get('classname')}.{case.get('name')}"
        skipped = case.find("skipped")
        if case.find("failure") is not None:
            yield name, "failed", case.find("failure").get("message", "")
        elif skipped is not None:
            yield name, "skipped", (skipped.get("message") or skipped.text or "").strip()
        elif case.get("status") != "notrun":
            yield name, "passed", ""


def program_result(program):
    """(outcome, reason) of one ctest test, without looking into it."""
    detail = program.find("failure")
    if detail is None:
        detail = program.find("skipped")
    reason = detail.get("message", "") if detail is not None else ""
    status = program.get("status")
    if status == "run":
        return "passed", reason
    # A test that could not be started is "notrun" too, and no success.
    skipped = status == "disabled" or (status == "notrun" and reason.startswith("SKIP_"))
    return ("skipped" if skipped else "failed"), reason


def results(junit, folder):
    """Yields (name, outcome, reason)."""
    for program in xml.parse(junit).getroot().iter("testcase"):
        name = program.get("name")
        outcome, reason = program_result(program)
        try:
            cases = list(gtest_cases(folder / f"{name}.xml"))
        except (OSError, xml.ParseError):
            cases = []  # no GoogleTest program, or one that died before it could report
        yield from cases
        if not cases or (outcome == "failed" and all(case[1] != "failed" for case in cases)):
            yield name, outcome, reason


def main():
    junit, folder = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
    outcomes = list(results(junit, folder))
    count = {kind: sum(outcome == kind for _, outcome, _ in outcomes)
             for kind in ("passed", "failed", "skipped")}
    print()
    for kind in ("skipped", "failed"):
        for name, outcome, reason in outcomes:
            if outcome == kind:
                lines = [line for line in reason.strip().splitlines() if line]
                print(f"{kind}: {name}" + (f": {lines[-1][:160]}" if lines else ""))
    print(f"{count['passed']} passed, {count['failed']} failed, {count['skipped']} skipped")
    return 1 if count["failed"] or not count["passed"] else 0


if __name__ == "__main__":
    sys.exit(main())
