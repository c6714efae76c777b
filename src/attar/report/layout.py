"""Text laid out for a terminal of some width."""

from __future__ import annotations

from io import StringIO
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from attar.report.record import clean_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


def render(parts: Iterable[RenderableType], width: int, colour: bool) -> str:
    """Lay out parts at a width; without `colour` the text holds no escape sequence."""
    console = Console(
        file=StringIO(),
        width=width,
        force_terminal=colour,
        color_system="standard" if colour else None,
        highlight=False,
        markup=False,  # names and texts are not ours: a "[red]" in them is a "[red]"
        emoji=False,
        legacy_windows=False,
    )
    with console.capture() as capture:
        console.print(Group(*parts))
    lines = capture.get().splitlines()
    return "\n".join(line.rstrip() for line in lines) + "\n"


def heading(title: str) -> Text:
    """The name of what a table is about."""
    return Text(clean_text(title), "bold underline")


def facts_table() -> Table:
    """Two columns, what and its value; both wrap inside their own column."""
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False, pad_edge=False, expand=False)
    table.add_column("", min_width=10)
    table.add_column("", overflow="fold")
    return table


def plain_table(*headers: str, right: Sequence[str] = ()) -> Table:
    """A table whose columns named in `right` hold numbers; the first column may fold."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=False)
    for header in headers:
        is_number = header in right
        table.add_column(
            Text(clean_text(header)),
            justify="right" if is_number else "left",
            no_wrap=is_number,
            overflow="fold",
        )
    return table


def bullet(mark: str, sentence: str) -> Table:
    """A sentence that wraps beside its mark."""
    row = Table.grid(padding=(0, 1, 0, 0))
    row.add_row(f"  {mark}", Text(sentence, overflow="fold"))
    return row
