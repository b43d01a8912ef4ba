"""Processes that an audit looks at."""

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

_PRELUDE = """
import ctypes, os, resource, socket, stat, sys, threading, time
from pathlib import Path
from kvmsec.linux import namespaces, syscalls
def become(uid):
    os.setgroups([]); os.setresgid(uid, uid, uid); os.setresuid(uid, uid, uid)
def own_tree(place):
    '''An empty tmpfs as the root, in a mount namespace of its own.'''
    namespaces.unshare(namespaces.CLONE_NEWNS)
    namespaces.mount(None, '/', None, namespaces.MS_REC | namespaces.MS_PRIVATE)
    namespaces.mount('tree', place, 'tmpfs', 0, 'size=1m,mode=755')
    return Path(place)
def ready():
    print('ready', flush=True); time.sleep(600)
"""


@pytest.fixture
def run() -> Iterator[Callable[..., int]]:
    """Runs a script until it says that it is ready; returns its pid, and ends it afterwards."""
    with contextlib.ExitStack() as stack:

        def start(script: str, **options: object) -> int:
            process = subprocess.Popen(
                [sys.executable, "-c", _PRELUDE + script],
                stdout=subprocess.PIPE,
                text=True,
                **options,  # type: ignore[call-overload]
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            return int(process.pid)

        yield start
