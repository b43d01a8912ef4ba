"""How a worker is told what to do: a line of JSON for each order, and one for its answer."""

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any


def serve(orders: Mapping[str, Callable[..., Any]]) -> None:
    """Carry out what standard input says, until it ends."""
    out = sys.stdout
    sys.stdout = sys.stderr  # What a peer prints is no answer.
    for line in sys.stdin:
        arguments = json.loads(line)
        try:
            answer = {"done": orders[arguments.pop("order")](**arguments)}
        except Exception as error:
            answer = {"failed": f"{type(error).__name__}: {error}"}
        out.write(json.dumps(answer) + "\n")
        out.flush()
