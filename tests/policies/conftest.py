"""Stock pipelines, quietly."""

import logging

import pytest
from stock_pipelines import FAMILIES, build


@pytest.fixture(autouse=True)
def _quiet():
    logging.getLogger("diffusers").setLevel(logging.ERROR)


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture
def stock(family):
    """The pipeline as diffusers has it; `load_policy` of it would change it, so a policy takes another."""
    return build(family)


@pytest.fixture(scope="session")
def make():
    """Builds the tiny pipeline of a family."""
    return build
