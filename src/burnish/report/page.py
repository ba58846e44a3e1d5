"""Pages that stand alone: one style sheet, pictures as data URIs, nothing fetched."""

import base64
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined


@cache
def _templates() -> Environment:
    return Environment(
        loader=FileSystemLoader(Path(__file__).parents[1] / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(template: str, **values: Any) -> str:
    """A page of `burnish/templates`; a value that the template names and nobody gave is an error."""
    environment = _templates()
    environment.filters["percent"] = percent
    return environment.get_template(template).render(**values)


def percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}%"


def data_uri(picture: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"
