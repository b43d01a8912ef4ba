"""Runs the command until a step of it, and dies there as if by a power cut.

A step is one that the command names itself, or a change that another process could see: a file
that is put in place or removed, a call to another node that is about to be made, or was answered.
Each is known by a label ("step save", "rename cluster.json", "call state.put", "answer state.put"),
which is the same in each run of a command.

usage: python -m tests.cluster.lab.fatal LABEL [ARGUMENT]...      dies at the first step of it
       python -m tests.cluster.lab.fatal --list FILE [ARGUMENT]...  dies nowhere, lists the labels
"""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

_FILES = {"os.rename": ("rename", 1), "os.remove": ("remove", 0), "os.link": ("link", 1)}
"""Audit events: what is done, and which of the arguments names the file."""


def main() -> None:
    fatal, arguments = sys.argv[1], sys.argv[2:]
    if fatal == "--list":
        listing = open(arguments.pop(0), "a", buffering=1)  # noqa: SIM115  (until the end)
        _at_each_step(lambda label: print(label, file=listing))
    else:
        _at_each_step(lambda label: label == fatal and os.kill(os.getpid(), signal.SIGKILL))
    from kvmsec.cli.main import entry_point

    sys.argv[1:] = arguments
    entry_point()


def _at_each_step(do: Callable[[str], object]) -> None:
    command = os.getpid()

    def step(label: str) -> None:
        # What its children do is no step of the command's.
        if os.getpid() == command:
            do(label)

    def heard(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _FILES:
            what, place = _FILES[event]
            path = os.fsdecode(arguments[place])
            if path.startswith("/") and not path.startswith(("/var/lib/kvmsec", "/etc/")):
                return
            step(f"{what} {os.path.basename(path)}")

    sys.addaudithook(heard)
    _at_each_call(step)
    _at_each_name(step)


def _at_each_call(step: Callable[[str], None]) -> None:
    from kvmsec.rpc import remote

    ask = remote._ask

    async def asked(transport: Any, name: str, *rest: Any) -> Any:
        step(f"call {name}")
        answer = await ask(transport, name, *rest)
        step(f"answer {name}")
        return answer

    remote._ask = asked


def _at_each_name(step: Callable[[str], None]) -> None:
    from kvmsec.cli.session import Session

    Session.on_step = lambda _, name: step(f"step {name}")  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
