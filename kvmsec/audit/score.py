"""From findings to one number, as `systemd-analyze security` has it: 0.0 sealed, 10.0 open.

Each finding's exposure is the part of the number that it accounts for. The points that every
process has weigh 10.0 together; what not every process has (a listener, a secret in an argument)
comes on top, and the sum ends at 10.0.
"""

from collections.abc import Iterable
from typing import Final, Literal

from attrs import frozen

State = Literal["sealed", "exposed", "unknown", "note"]

HIGHEST: Final = 10.0

# The words of systemd's analyze-security.c, each from this exposure on.
_RATINGS: Final = (
    (10.0, "DANGEROUS"),
    (9.0, "UNSAFE"),
    (7.5, "EXPOSED"),
    (5.0, "MEDIUM"),
    (1.0, "OK"),
    (0.1, "SAFE"),
)
_BEST: Final = "PERFECT"


@frozen(kw_only=True)
class Finding:
    """The answer to one point: `exposure` is what it adds to the score, at most `weight`.

    `state` tells what is fine (`sealed`) from what could not be read (`unknown`, which counts as
    the worst) and from what is only worth knowing (`note`). `message`, `why` and `hint` hold
    nothing that the process could have put there unescaped.
    """

    code: str
    exposure: float
    weight: float
    state: State
    message: str
    why: str
    hint: str | None = None


def score(findings: Iterable[Finding]) -> float:
    """The sum of exposures, at most 10.0, in hundredths."""
    return min(HIGHEST, round(sum(finding.exposure for finding in findings), 2))


def rating(value: float) -> str:
    """The word for a score, from the tenths that are shown."""
    return next((word for least, word in _RATINGS if round(value, 1) >= least), _BEST)
