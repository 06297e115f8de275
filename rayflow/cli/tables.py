"""Tables and sizes on a terminal, the same in every command."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text


class PlainTable(Table):
    """Rows of plain text: what stands in data is no markup."""

    def add_row(self, *cells: object, **options: object) -> None:
        super().add_row(*(Text(str(cell)) for cell in cells))


def table(*columns: str) -> Table:
    found = PlainTable(box=None, pad_edge=False)
    for column in columns:
        found.add_column(Text(column), overflow="fold")
    return found


def print_table(shown: Table) -> None:
    # A pipe has no width: who reads it by program gets whole lines.
    console = Console() if Console().is_terminal else Console(width=240)
    console.print(shown)


def size(nbytes: int) -> str:
    scaled = float(nbytes)
    for unit in ("B", "KB", "MB"):
        if scaled < 1000:
            return f"{scaled:.3g} {unit}"
        scaled /= 1000
    return f"{scaled:.3g} GB"
