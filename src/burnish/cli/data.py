"""`burnish data`: sets of feedback, looked at and converted."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from burnish.cli.tables import given

app = typer.Typer(help="Sets of feedback: look at one, or write it in another form.", no_args_is_help=True)

Source = Annotated[str, typer.Argument(metavar="SET", help="A file, a folder, or a set of the hub, as org/name:train.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Rows that are read.")]


class Kind(StrEnum):
    pairs = "pairs"
    thumbs = "thumbs"
    pictures = "pictures"


@app.command("check")
def check(
    source: Source,
    limit: Limit = None,
    output: Annotated[Path | None, typer.Option(help="A PNG with some of the rows.")] = None,
) -> None:
    """Count what is sound and what is not, row by row and picture by picture; exits with 2 if nothing is."""
    from burnish import pipeline

    pipeline.check_data(source, **given(limit=limit, output=output))


@app.command("convert")
def convert(
    source: Source,
    output: Annotated[Path, typer.Argument(help="The new set: .parquet, .tar (WebDataset) or a folder.")],
    to: Annotated[Kind, typer.Option(help="What its rows are.")] = Kind.pairs,
    limit: Limit = None,
) -> None:
    """Write a set in another form; rows that are not sound are left out and counted."""
    from burnish import pipeline

    pipeline.convert_data(source, output, to=to.value, **given(limit=limit))
