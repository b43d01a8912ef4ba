"""Processes that draw uids at once, each for itself; nothing but the standard library.

Imported by a worker, which has no package of this project's, and by the benchmark.
"""

import json
import os
import time
from collections.abc import Callable
from typing import Any

Drawn = tuple[int, float, float, float]
"""A uid, when its draw began, when it was had, and until when: seconds of CLOCK_MONOTONIC.

A draw that failed is of uid -1.
"""


def draw_in_processes(
    drawers: int,
    each: int,
    draw: Callable[[], Any],
    uid_of: Callable[[Any], int],
    release: Callable[[Any], object],
    refused: type[Exception],
) -> list[Drawn]:
    """Have that many processes draw and release `each` times; what all of them had."""
    go, say_go = os.pipe()
    answers = []
    for _ in range(drawers):
        out, into = os.pipe()
        if os.fork() == 0:
            os.close(say_go)
            os.read(go, 1)  # Until all are there: the other end is closed then.
            found = _draw(each, draw, uid_of, release, refused)
            with os.fdopen(into, "w") as file:
                json.dump(found, file)
            os._exit(0)
        os.close(into)
        answers.append(out)
    os.close(go)
    os.close(say_go)
    found = []
    for out in answers:
        with os.fdopen(out) as file:
            found += [tuple(one) for one in json.load(file)]
    for _ in range(drawers):
        os.wait()
    return found


def _draw(
    each: int,
    draw: Callable[[], Any],
    uid_of: Callable[[Any], int],
    release: Callable[[Any], object],
    refused: type[Exception],
) -> list[Drawn]:
    found = []
    for _ in range(each):
        begin = time.monotonic()
        try:
            drawn = draw()
        except refused:
            now = time.monotonic()
            found.append((-1, begin, now, now))
            continue
        had = time.monotonic()
        uid = uid_of(drawn)
        found.append((uid, begin, had, time.monotonic()))
        try:
            release(drawn)
        except refused:
            found.append((-1, begin, had, had))
    return found
