"""What a run did, on one page that stands alone."""

from pathlib import Path

from burnish.config import read_recipe
from burnish.errors import UserError
from burnish.report.page import data_uri, render
from burnish.report.reward_model import write_reward_report
from burnish.report.run import describe, write_online_report

__all__ = ["data_uri", "describe", "render", "write_report", "write_reward_report"]


def write_report(run: Path) -> Path:
    """Write `report.html` from what `run` holds and return its path; UserError where that is no run."""
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run} holds no config.yaml, so there is nothing to report on: give a run's directory")
    return (write_reward_report if "signal" in read_recipe(run / "config.yaml") else write_online_report)(run)
