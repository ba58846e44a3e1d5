"""What a run did, on one page that stands alone."""

from burnish.report.page import data_uri, render
from burnish.report.reward_model import write_reward_report
from burnish.report.run import describe, write_report

__all__ = ["data_uri", "describe", "render", "write_report", "write_reward_report"]
