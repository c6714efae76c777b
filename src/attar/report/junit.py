"""The checks of a verdict as JUnit XML, which build servers show.

Source: the schema of Jenkins' xUnit plugin, junit-10.xsd.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from xml.etree import ElementTree

from attar.report.record import clean_text

if TYPE_CHECKING:
    from attar.records import Check, Report


def report_to_junit(report: Report) -> str:
    """One test case for each check: a failure where it failed, an error where it is undecided."""
    checks = report.verdict.checks
    counts = {
        "tests": len(checks),
        "failures": sum(check.outcome == "failed" for check in checks),
        "errors": sum(check.outcome == "undecided" for check in checks),
    }
    suite = ElementTree.Element(
        "testsuite",
        {"name": clean_text(f"attar audit {report.model}")}
        | {name: str(count) for name, count in counts.items()},
    )
    for check in checks:
        case = ElementTree.SubElement(
            suite, "testcase", {"classname": "attar.audit", "name": clean_text(check.name)}
        )
        if check.outcome != "passed":
            kind = "failure" if check.outcome == "failed" else "error"
            ElementTree.SubElement(case, kind, {"type": check.outcome, "message": _message(check)})
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def _message(check: Check) -> str:
    limit = f"the limit is {'at least ' if check.at_least else ''}{check.limit:g}"
    if check.found is None:
        return f"not known from this data; {limit}"
    found = check.found
    return f"{found.value:g} ({found.low:g} to {found.high:g}); {limit}"
