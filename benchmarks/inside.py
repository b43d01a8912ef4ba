"""One benchmark, in the sandbox: its report goes to a descriptor as JSON."""

import importlib
import os
import sys
import time

import msgspec
from attrs import evolve

from benchmarks.effort import Effort
from benchmarks.sandbox import furnish


def main() -> None:
    name, effort, descriptor = sys.argv[1:]
    furnish()
    begin = time.monotonic()
    report = importlib.import_module(f"benchmarks.{name}").measure(Effort(effort))
    with os.fdopen(int(descriptor), "wb") as out:
        out.write(msgspec.json.encode(evolve(report, took_s=time.monotonic() - begin)))


if __name__ == "__main__":
    main()
