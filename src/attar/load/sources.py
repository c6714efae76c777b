"""What `--data` and `--slices` point at: files, folders and tables, as a list of entries."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from attar.errors import DataError

TABLE_SUFFIXES = frozenset({".tsv", ".csv"})
MAX_FOLDER_SLICES = 24  # every slice is one more set of prices in memory and in the report


@dataclass(frozen=True)
class Entry:
    """One file, or one row of a table.

    Attributes:
        name: Path inside the folder, name of the file, or "row 3" of a table.
        path: The file; None for text that stands in a table.
        text: From the table; None for a file.
        label: Slice; "" where there is none.
        answer: True class, its number or name; "" where it is not known.
    """

    name: str
    path: Path | None
    text: str | None
    label: str = ""
    answer: str = ""


def read_entries(
    source: str, suffixes: frozenset[str], wanted: str, slices: str | None
) -> tuple[list[Entry], str]:
    """List what the source holds, with slice labels where they are given.

    Args:
        source: A file, a folder (its sub-folders are labels) or a .tsv/.csv table with a column
            `text` or `path`, and perhaps `label` and `answer`.
        suffixes: Of files that fit the model, lower case with the dot.
        wanted: The same in words, for errors.
        slices: A column of the table, or a two-column .tsv: sample, label.

    Returns:
        entries: In the order of names (a table: of rows).
        note: What a reader should know about labels, or "".

    Raises:
        DataError: Nothing there, nothing that fits, a table or label file that cannot be read.
    """
    path = Path(source)
    if not path.exists():
        raise DataError(f"{source} is not there.", hint=f"give {wanted} with --data")
    labels = _read_label_file(slices) if slices and Path(slices).is_file() else None
    note = ""
    if path.is_dir():
        entries = _list_folder(path, suffixes, wanted)
        entries, note = _folder_labels(entries, labelled=labels is not None)
    elif path.suffix.lower() in TABLE_SUFFIXES:
        entries = _read_table(path, suffixes, None if labels is not None else slices)
    elif path.suffix.lower() in suffixes:
        entries = [Entry(path.name, path, None)]
    else:
        raise DataError(
            f"{source} is a {path.suffix or 'file without a suffix'}, which does not fit the "
            f"model: it needs {wanted}.",
            hint=f"give {wanted} with --data",
        )
    if labels is not None:
        entries = [replace(entry, label=_label_of(entry, labels, str(slices))) for entry in entries]
    elif slices and not any(entry.label for entry in entries):
        raise DataError(
            f"--slices {slices} is neither a file nor a column of {source}.",
            hint="give a two-column .tsv (sample, label), or data in sub-folders or a .tsv table",
        )
    return entries, note


def _list_folder(folder: Path, suffixes: frozenset[str], wanted: str) -> list[Entry]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    fitting = [path for path in files if path.suffix.lower() in suffixes]
    if not fitting:
        kinds = Counter(path.suffix.lower() or "(no suffix)" for path in files)
        held = ", ".join(f"{count} {suffix}" for suffix, count in kinds.most_common(4))
        raise DataError(
            f"the folder {folder} holds {held or 'nothing'}; the model needs {wanted}.",
            hint=f"give {wanted} with --data",
        )
    entries = []
    for path in fitting:
        inside = path.relative_to(folder)
        label = inside.parts[0] if len(inside.parts) > 1 else ""
        entries.append(Entry(inside.as_posix(), path, None, label))
    return entries


def _folder_labels(entries: list[Entry], *, labelled: bool) -> tuple[list[Entry], str]:
    """Keep sub-folders as labels where every file has one and there are not too many."""
    names = {entry.label for entry in entries}
    bare = [replace(entry, label="") for entry in entries]
    if labelled or names == {""}:
        return bare, ""
    if "" in names:
        return bare, "sub-folders are not slices: some files lie outside them"
    if len(names) > MAX_FOLDER_SLICES:
        return bare, f"sub-folders are not slices: {len(names)}, the limit is {MAX_FOLDER_SLICES}"
    return entries, ""


def _rows(path: Path) -> list[list[str]]:
    delimiter = "," if path.suffix.lower() == ".csv" else "\t"
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return [row for row in csv.reader(file, delimiter=delimiter) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as fault:
        raise DataError(
            f"{path} cannot be read as a table: {fault}.",
            hint="save it as UTF-8 text with tabs (.tsv) or commas (.csv) between the columns",
        ) from fault


def _read_table(path: Path, suffixes: frozenset[str], column: str | None) -> list[Entry]:
    header, *rows = _rows(path) or [[]]
    names = [name.strip() for name in header]
    content = next((name for name in ("text", "path") if name in names), None)
    if content is None or not rows:
        raise DataError(
            f"{path} has {len(rows)} rows under the columns {', '.join(names) or 'none'}.",
            hint="the first line names the columns: text or path, and perhaps label",
        )
    if column is not None and column not in names:
        raise DataError(
            f"{path} has no column {column}; it has {', '.join(names)}.",
            hint=f"give --slices one of them, for example --slices {names[-1]}",
        )
    label_at = names.index(column or "label") if (column or "label") in names else None
    answer_at = names.index("answer") if "answer" in names else None
    content_at = names.index(content)
    entries = []
    for number, row in enumerate(rows, start=2):
        if len(row) != len(names):
            raise DataError(
                f"line {number} of {path} has {len(row)} columns, the first line has {len(names)}.",
                hint="give every line the same columns",
            )
        label, answer = ("" if at is None else row[at].strip() for at in (label_at, answer_at))
        if content == "text":
            entries.append(Entry(f"row {number}", None, row[content_at], label, answer))
            continue
        file = path.parent / row[content_at]
        if not file.is_file() or file.suffix.lower() not in suffixes:
            raise DataError(
                f"line {number} of {path} names {row[content_at]}, which is not there or does "
                "not fit the model.",
                hint=f"paths are relative to {path.parent}; files end in "
                + " ".join(sorted(suffixes)),
            )
        entries.append(Entry(row[content_at], file, None, label, answer))
    return entries


def _read_label_file(slices: str) -> Mapping[str, str]:
    rows = _rows(Path(slices))
    if not rows or any(len(row) != 2 for row in rows):
        raise DataError(
            f"{slices} does not have two columns on every line.",
            hint="write one sample and its label on each line, with a tab between them",
        )
    return {sample.strip(): label.strip() for sample, label in rows}


def _label_of(entry: Entry, labels: Mapping[str, str], slices: str) -> str:
    for name in (entry.name, Path(entry.name).name, entry.text or ""):
        if name in labels:
            return labels[name]
    raise DataError(
        f"{slices} has no label for {entry.name}.",
        hint="give every sample a line: its name in the folder, a tab, its label",
    )


def read_text(entry: Entry) -> str:
    """Text of an entry.

    Raises:
        DataError: The file is not UTF-8 or cannot be read.
    """
    if entry.text is not None:
        return entry.text
    assert entry.path is not None
    try:
        return entry.path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as fault:
        raise DataError(
            f"{entry.path} cannot be read as UTF-8 text: {fault}.",
            hint="save it as UTF-8, for example with iconv -t UTF-8",
        ) from fault
