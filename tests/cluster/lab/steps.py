"""A command that dies at a step of its own, as by a power cut (`fatal.py`)."""

import sys
from typing import Any

from tests.cluster.lab.node import Node
from tests.cluster.lab.process import Finished

_FATAL = (sys.executable, "-m", "tests.cluster.lab.fatal")


def dying_at(node: Node, label: str, *arguments: str, **options: Any) -> Finished:
    """Run the command, which dies before the first step of that label; any status is fine."""
    return node.run(*_FATAL, label, *arguments, status=None, **options)


def steps_of(node: Node, *arguments: str, **options: Any) -> list[str]:
    """Run the command to its end, which must be a good one; each of its steps, once, in order."""
    listing = "/var/log/steps"
    node.path(listing).unlink(missing_ok=True)
    node.run(*_FATAL, "--list", listing, *arguments, **options)
    return list(dict.fromkeys(node.path(listing).read_text().splitlines()))
