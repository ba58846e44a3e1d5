"""What there is to know of a shipped reward before it is loaded."""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from burnish.errors import UserError


def need(reward: str, engine: str, modules: Sequence[str], how: str) -> None:
    """UserError, with what to do, where an engine of a reward lacks one of these modules."""
    if missing := [module for module in modules if importlib.util.find_spec(module) is None]:
        raise UserError(f"reward {reward}: engine={engine} needs {' and '.join(missing)}: {how}")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """`make(**settings)`: the reward, a frozen `nn.Module` for a network's, called `(images, prompts, metadata)`.

    Its keyword-only arguments are the settings of a recipe. `packages`: modules that it needs beyond burnish's own, had
    with `pip install 'burnish[extra]'`.
    """

    make: Callable[..., Any]
    title: str
    measures: str  # what a high score means
    scale: str  # which numbers to expect
    differentiable: bool  # with respect to the pixels
    prompt: str  # what it reads of the prompt and its metadata
    licence: str
    size: str  # of what is downloaded
    source: str  # the paper's or the repository's address
    packages: tuple[str, ...] = ()
    extra: str | None = None

    @property
    def missing(self) -> list[str]:
        """The packages that are not installed."""
        return [package for package in self.packages if importlib.util.find_spec(package) is None]

    @property
    def here(self) -> str:
        """Whether it can be used on this machine, or what has to be installed first."""
        if not self.missing:
            return "yes"
        how = f"'burnish[{self.extra}]'" if self.extra else " ".join(self.missing)
        return f"no {' and '.join(self.missing)}: pip install {how}"
