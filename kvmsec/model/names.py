"""Which names clusters, instances and nodes may have: they become paths, rules and log lines."""

import re
from typing import Final, Literal

from kvmsec.errors import BadName

Named = Literal["a cluster", "an instance", "a node"]

_SHORT: Final = re.compile(r"[a-z0-9][a-z0-9.-]{0,62}")
_SHORT_RULE: Final = (
    "1 to 63 of a-z, 0-9, dot and hyphen, the first of them a letter or a digit (ASCII, lower case)"
)
# A host name as gethostname(2) may give it: RFC 1123 allows upper case and 253 characters.
_HOST: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]{0,252}")
_HOST_RULE: Final = "1 to 253 of letters, digits, dot and hyphen, no dot or hyphen first (ASCII)"


def require_name(what: Named, name: str) -> str:
    """The name itself, if `what` may have it. Raises BadName."""
    pattern, rule = (_HOST, _HOST_RULE) if what == "a node" else (_SHORT, _SHORT_RULE)
    if pattern.fullmatch(name) is None:
        raise BadName(what, name, rule)
    return name
