"""`attar audit`: its options, and what it writes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from attar.command_output import (
    check_file,
    exit_code,
    recipe_of,
    screen,
    show,
    write_bytes,
    write_json,
)
from attar.options import (
    MODEL_HELP,
    AcceptLicence,
    Audit,
    Calibration,
    DataPath,
    Degrid,
    Factory,
    JsonFile,
    Recovery,
    Seed,
    Slices,
    TaskName,
    Threads,
)
from attar.progress import open_progress
from attar.records import Recipe


def audit_command(
    original: Annotated[str, typer.Argument(metavar="ORIGINAL", help=MODEL_HELP)],
    compressed: Annotated[str, typer.Argument(metavar="COMPRESSED", help=MODEL_HELP)],
    data: DataPath = None,
    slices: Slices = None,
    seed: Seed = 0,
    task: TaskName = None,
    factory: Factory = None,
    degrid: Degrid = None,
    calibration: Calibration = None,
    recovery: Recovery = None,
    audit: Audit = None,
    threads: Threads = 2,
    accept_licence: AcceptLicence = False,
    json_file: JsonFile = None,
    report: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write report.html and report.json there.")
    ] = None,
    policy: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Limits, in YAML: see docs/verdict.md.")
    ] = None,
    junit: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write each check as JUnit XML.")
    ] = None,
    evidence: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a signed bundle of all this there.")
    ] = None,
    sign: Annotated[
        Path | None, typer.Option(metavar="KEY", help="Ed25519 private key, PEM, for --evidence.")
    ] = None,
    attribute: Annotated[
        bool, typer.Option("--attribute", help="Also say which layers lost how much of it.")
    ] = False,
    drift: Annotated[
        bool, typer.Option("--drift", help="Also say how far explanations of answers moved.")
    ] = False,
    reference: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="For --drift: another training, to be shown beside."),
    ] = None,
    signer: Annotated[
        str | None, typer.Option(metavar="HEX", help="For verify: whose key must have signed.")
    ] = None,
) -> int:
    """Compare any two models, whoever compressed; or check a bundle: attar audit verify FILE."""
    if original == "verify":
        return _verify(Path(compressed), signer)
    _check_evidence(evidence, sign)
    from attar import drifting, judging, pipeline, serving
    from attar.report.html import write_report
    from attar.report.junit import report_to_junit
    from attar.report.record import jsonable, verdict_to_json
    from attar.report.terminal import audit_to_text

    first = recipe_of({**locals(), "model": original, "factory": None})
    second = Recipe(model=compressed, factory=factory, task=task, accept_licence=accept_licence)
    third = None if reference is None else drifting.recipe_of(reference, second)
    for file in (json_file, junit):
        check_file(file)
    limits = None if policy is None else judging.open_policy(policy)
    with open_progress() as progress:
        found = pipeline.audit(
            first,
            second,
            policy=limits,
            attribute=attribute,
            drift=drift,
            reference=third,
            progress=progress,
        )
    show(audit_to_text(found.verdict, **screen()))
    if json_file is not None:
        write_json(json_file, jsonable(verdict_to_json(found.verdict), "", []))
    if junit is not None:
        write_bytes(junit, report_to_junit(found).encode())
    if evidence is not None and sign is not None:
        write_bytes(evidence, serving.evidence(found, limits, sign))
    if report is not None:
        show(f"report  {write_report(found, report)[0]}")
    return exit_code(found.verdict)


def _check_evidence(evidence: Path | None, sign: Path | None) -> None:
    """Refuse what cannot be signed or written, before long work."""
    from attar.audit.evidence import read_key

    if (evidence is None) != (sign is None):
        raise typer.BadParameter("--evidence FILE and --sign KEY go together")
    check_file(evidence)
    if sign is not None:
        read_key(sign)


def _verify(bundle: Path, signer: str | None) -> int:
    """Do what `attar audit verify` does."""
    from attar.audit.evidence import verify

    found = verify(bundle, signer)
    verdict = found.facts["verdict"]
    show(f"whole, and signed by {found.fingerprint}")
    if signer is None:
        show("whose key that is, only its owner can tell you: compare, or give --signer")
    show(f"{found.facts['model']['name']}: {verdict['outcome']}")
    for reason in verdict["reasons"]:
        show(f"  - {reason}")
    return 0
