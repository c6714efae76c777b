"""The options of the command line, each written once; a command names those it has."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

MODEL_HELP = "A built-in name, a folder, a GGUF file, package.module:factory; to run, also ONNX."
ModelName = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
Size = Annotated[
    str,
    typer.Option(metavar="SIZE", help="Of the whole written folder: 60MB, 64MiB, 25%, 3.1bits."),
]
SizeOrNone = Annotated[
    str | None,
    typer.Option("--size", metavar="SIZE", help="Of the whole written folder, as for compress."),
]
FrontierFolder = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Price once, and show what is lost at every size."),
]
PlanFile = Annotated[
    Path,
    typer.Argument(
        metavar="PLAN", help="From attar plan, or a folder: its frontier, or a model with a report."
    ),
]
DataPath = Annotated[
    str | None,
    typer.Option("--data", metavar="PATH", help="File or folder; else the default of the task."),
]
Slices = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Labels of the samples: a .tsv, or a column of the data."),
]
Keep = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="A unit, or pattern with *, that stays in 16 bits. Repeat."),
]
Protect = Annotated[
    list[str] | None,
    typer.Option(
        metavar="SLICE:NATS",
        help="A label of --slices, class=NUMBER or concept=… that may lose so much. Repeat.",
    ),
]
Seed = Annotated[int, typer.Option(metavar="N", help="Of every random draw.")]
TaskName = Annotated[
    str | None,
    typer.Option("--task", metavar="TASK", help="Of a factory model: classify or regress."),
]
Factory = Annotated[
    str | None,
    typer.Option(
        metavar="P:F", help="Code of a folder that Attar made from package.module:factory."
    ),
]
Degrid = Annotated[
    int | None,
    typer.Option(metavar="SEED", help="First take the weights off their quantization grid."),
]
Calibration = Annotated[
    int | None, typer.Option(metavar="N", help="Tokens or samples that prices are gathered on.")
]
Recovery = Annotated[
    int | None, typer.Option(metavar="N", help="Tokens or samples that the plan is checked on.")
]
Audit = Annotated[
    int | None,
    typer.Option("--audit", metavar="N", help="Tokens or samples that the result is judged on."),
]
Rounds = Annotated[
    int, typer.Option(min=1, metavar="N", help="Turns of solve, measure and correct.")
]
Threads = Annotated[
    int,
    typer.Option(min=1, metavar="N", help="Pieces of work at once; the result stays the same."),
]
Workers = Annotated[
    str,
    typer.Option(
        metavar="N|ADDRESS",
        help="Start N workers, or join a Ray (ray://HOST:10001); the result stays the same.",
    ),
]
AcceptLicence = Annotated[
    bool, typer.Option("--accept-licence", help="You accept the terms of a model that has some.")
]
To = Annotated[
    str,
    typer.Option(metavar="FORM", help="attar, gguf for llama.cpp, or onnx for onnxruntime."),
]
Activations = Annotated[
    str,
    typer.Option(
        metavar="KIND", help="Also in 8 bits, with --to onnx: static, dynamic, or none of them."
    ),
]
Decide = Annotated[
    str,
    typer.Option(metavar="NAME", help="price, or the way of a paper: see docs/methods.md."),
]
Equalise = Annotated[
    str,
    typer.Option(
        metavar="HOW",
        help="none, auto: change channels before rounding if it pays, or learned: by gradient too.",
    ),
]
Biases = Annotated[
    str,
    typer.Option(metavar="HOW", help="kept, or moved to take up the mean error of their layer."),
]
Cut = Annotated[
    str,
    typer.Option(
        metavar="HOW",
        help="off, auto: also cut channels, neurons, heads if it pays, or only: and round nothing.",
    ),
]
Heal = Annotated[
    str,
    typer.Option(
        metavar="HOW=TIME",
        help="none, or distill=10min: let what was made learn to answer as the original.",
    ),
]
Out = Annotated[Path, typer.Option(metavar="DIR", help="Folder to write.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what an earlier run wrote.")]
Restart = Annotated[
    bool, typer.Option("--restart", help="Do again what a run that was killed had finished.")
]
JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write the same facts as JSON.")
]
Generate = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Let language models go on with N openings of texts."),
]
Prompts = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Prompts to go on with instead, one a line.")
]
ChoiceFiles = Annotated[
    list[Path] | None,
    typer.Option("--choices", metavar="FILE", help="Multiple choice, JSON lines. Repeat."),
]
PolicyFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Limits, in YAML: see docs/verdict.md.")
]
Junit = Annotated[Path | None, typer.Option(metavar="FILE", help="Write each check as JUnit XML.")]
Evidence = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write a signed bundle of all this there.")
]
Sign = Annotated[
    Path | None, typer.Option(metavar="KEY", help="Ed25519 private key, PEM, for --evidence.")
]
Attribute = Annotated[
    bool, typer.Option("--attribute", help="Also say which layers lost how much of it.")
]
Pictures = Annotated[
    str | None,
    typer.Option(
        metavar="HOW", help="How ONNX or OpenVINO files read them: imagenet, half, unit, bytes."
    ),
]
CorruptionsAsked = Annotated[
    bool, typer.Option("--corruptions", help="Also audit on inputs with small corruptions.")
]
DriftAsked = Annotated[
    bool, typer.Option("--drift", help="Also say how far explanations of answers moved.")
]
Reference = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="For --drift: another training, to be shown beside."),
]
Signer = Annotated[
    str | None, typer.Option(metavar="HEX", help="For verify: whose key must have signed.")
]
ReportFolder = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Write report.html and report.json there.")
]
