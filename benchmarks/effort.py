"""How much is repeated: what a table is published of, what fits three minutes, or a look."""

from enum import StrEnum
from typing import TypeVar

_T = TypeVar("_T")


class Effort(StrEnum):
    FULL = "full"
    QUICK = "quick"
    SMOKE = "smoke"
    """Each measurement once or twice, to see that it runs: its figures say nothing."""

    def pick(self, full: _T, quick: _T, smoke: _T) -> _T:
        return {Effort.FULL: full, Effort.QUICK: quick, Effort.SMOKE: smoke}[self]
