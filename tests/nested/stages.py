"""How long each stage of a run took, for the table at its end."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from attrs import define, field


@define
class Stages:
    """Stages in the order in which they ended, in seconds."""

    done: list[tuple[str, float]] = field(factory=list)

    @contextmanager
    def measured(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self.note(name, time.monotonic() - began)

    def note(self, name: str, seconds: float) -> None:
        self.done.append((name, seconds))
