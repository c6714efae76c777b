"""`attar audit`: its options, and what it writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    Attribute,
    Audit,
    Calibration,
    ChoiceFiles,
    CorruptionsAsked,
    DataPath,
    Degrid,
    DriftAsked,
    Evidence,
    Factory,
    Generate,
    JsonFile,
    Junit,
    Pictures,
    PolicyFile,
    Prompts,
    Recovery,
    Reference,
    ReportFolder,
    Restart,
    Seed,
    Sign,
    Signer,
    Slices,
    TaskName,
    Threads,
)
from attar.progress import open_progress

if TYPE_CHECKING:
    from attar.audit.policy import Policy
    from attar.auditing import Wishes
    from attar.records import Recipe


def audit_command(
    original: Annotated[str, typer.Argument(metavar="ORIGINAL", help=MODEL_HELP)],
    compressed: Annotated[
        list[str], typer.Argument(metavar="COMPRESSED", help="One or several, likewise.")
    ],
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
    report: ReportFolder = None,
    policy: PolicyFile = None,
    junit: Junit = None,
    evidence: Evidence = None,
    sign: Sign = None,
    attribute: Attribute = False,
    drift: DriftAsked = False,
    corruptions: CorruptionsAsked = False,
    pictures: Pictures = None,
    reference: Reference = None,
    generate: Generate = None,
    prompts: Prompts = None,
    choices: ChoiceFiles = None,
    signer: Signer = None,
    restart: Restart = False,
) -> int:
    """Compare any models, whoever compressed; or check a bundle: attar audit verify FILE."""
    if original == "verify":
        return _verify(compressed, signer)
    _check_evidence(evidence, sign)
    _check_single(compressed, junit, evidence)
    for file in (json_file, junit):
        check_file(file)
    first = recipe_of({**locals(), "model": original, "factory": None})
    from attar.records import Behaviours, Recipe

    others = [
        Recipe(model=one, factory=factory, task=task, accept_licence=accept_licence)
        for one in compressed
    ]
    from attar.auditing import Wishes
    from attar.drifting import recipe_of as recipe_of_reference

    asked = Behaviours(generate or 0, prompts, tuple(choices or ()))
    wishes = Wishes(
        _limits(policy),
        attribute,
        drift,
        None if reference is None else recipe_of_reference(reference, others[0]),
        asked,
        corruptions,
        pictures or "",
    )
    if len(others) > 1:
        return _audit_all(first, others, wishes, json_file, report, restart)
    return _audit_one(first, others[0], wishes, json_file, report, junit, (evidence, sign), restart)


def _audit_one(
    original: Recipe,
    compressed: Recipe,
    wishes: Wishes,
    json_file: Path | None,
    report: Path | None,
    junit: Path | None,
    evidence: tuple[Path | None, Path | None],
    restart: bool,
) -> int:
    """Do what `attar audit` does with one compressed model."""
    from attar import pipeline, serving
    from attar.report.html import write_report
    from attar.report.junit import report_to_junit
    from attar.report.record import jsonable, verdict_to_json
    from attar.report.terminal import audit_to_text

    with open_progress() as progress:
        found = pipeline.audit(
            original,
            compressed,
            wishes,
            out=report or json_file or junit or evidence[0],
            restart=restart,
            progress=progress,
        )
    show(audit_to_text(found.verdict, **screen()))
    if json_file is not None:
        write_json(json_file, jsonable(verdict_to_json(found.verdict), "", []))
    if junit is not None:
        write_bytes(junit, report_to_junit(found).encode())
    bundle, key = evidence
    if bundle is not None and key is not None:
        write_bytes(bundle, serving.evidence(found, wishes.policy, key))
    if report is not None:
        show(f"report  {write_report(found, report)[0]}")
    return exit_code(found.verdict)


def _audit_all(
    original: Recipe,
    compressed: Sequence[Recipe],
    wishes: Wishes,
    json_file: Path | None,
    report: Path | None,
    restart: bool,
) -> int:
    """Do what `attar audit` does with several; the exit code is that of the worst verdict."""
    from attar import comparing, pipeline
    from attar.report.population import (
        population_to_json,
        population_to_text,
        write_population,
    )

    with open_progress() as progress:
        found = pipeline.audit_all(
            original,
            compressed,
            wishes,
            out=report or json_file,
            restart=restart,
            progress=progress,
        )
    show(population_to_text(found, **screen()))
    if json_file is not None:
        write_json(json_file, population_to_json(found))
    if report is not None:
        show(f"report  {write_population(found, report)}")
    return exit_code(comparing.worst(found).verdict)


def _limits(policy: Path | None) -> Policy | None:
    from attar import judging

    return None if policy is None else judging.open_policy(policy)


def _check_single(compressed: list[str], junit: Path | None, evidence: Path | None) -> None:
    """Refuse with several models what holds the verdict on one."""
    if len(compressed) > 1 and (junit or evidence):
        raise typer.BadParameter("--junit and --evidence are about one compressed model")


def _check_evidence(evidence: Path | None, sign: Path | None) -> None:
    """Refuse what cannot be signed or written, before long work."""
    from attar.audit.evidence import read_key

    if (evidence is None) != (sign is None):
        raise typer.BadParameter("--evidence FILE and --sign KEY go together")
    check_file(evidence)
    if sign is not None:
        read_key(sign)


def _verify(bundles: list[str], signer: str | None) -> int:
    """Do what `attar audit verify` does."""
    from attar.audit.evidence import verify

    if len(bundles) > 1:
        raise typer.BadParameter("attar audit verify checks one FILE")
    found = verify(Path(bundles[0]), signer)
    verdict = found.facts["verdict"]
    show(f"whole, and signed by {found.fingerprint}")
    if signer is None:
        show("whose key that is, only its owner can tell you: compare, or give --signer")
    show(f"{found.facts['model']['name']}: {verdict['outcome']}")
    for reason in verdict["reasons"]:
        show(f"  - {reason}")
    return 0
