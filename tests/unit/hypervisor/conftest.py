"""Monitors that behave as a script says, each in a process of its own."""

import gc
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

SERVER = r"""
import json, os, socket, sys, time
peer = socket.socket(fileno=int(sys.argv[1]))
GREETING = b'{"QMP": {"version": {"qemu": {"major": 7}}, "capabilities": ["oob"]}}\r\n'
EVENT = b'{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "NOISE", "data": {"n": 1}}\n'
SMALL = b'{"event":"N"}\n'
BOMB = b'{"event": "BOMB", "data": {"x": [' + b"{}," * 340000 + b'0]}}\n'
unread = ""
def hear():
    global unread
    while True:
        try:
            command, end = json.JSONDecoder().raw_decode(unread.lstrip())
            unread = unread.lstrip()[end:]
            return command
        except ValueError:
            chunk = peer.recv(65536)
            if not chunk:
                sys.exit()
            unread += chunk.decode()
def say(message):
    peer.sendall(json.dumps(message).encode() + b"\r\n")
def answer(command, value={}):
    say({"return": value, "id": command["id"]})
def refuse(command, kind="GenericError", words="no"):
    say({"error": {"class": kind, "desc": words}, "id": command["id"]})
def greet():
    peer.sendall(GREETING)
    command = hear()
    assert command["execute"] == "qmp_capabilities", command
    answer(command)
def stay():
    while peer.recv(65536):
        pass
def flood(data):
    while True:
        peer.sendall(data)
"""


@contextmanager
def _servers() -> Iterator[Callable[[str, socket.socket], None]]:
    """Give a function that runs a script over a socket, which it closes on this side."""
    servers = []

    def start(script: str, theirs: socket.socket) -> None:
        with theirs:
            argv = [sys.executable, "-I", "-S", "-c", SERVER + script, str(theirs.fileno())]
            servers.append(
                subprocess.Popen(argv, pass_fds=[theirs.fileno()], stderr=subprocess.DEVNULL)
            )

    try:
        yield start
    finally:
        for server in servers:
            server.kill()
            server.wait()


@pytest.fixture
def serve() -> Iterator[Callable[[str], socket.socket]]:
    """Run a script as a monitor; gives the client's end of the line.

    Afterwards no descriptor and no thread may be left of it.
    """
    before = set(os.listdir("/proc/self/fd"))
    with _servers() as start:

        def connect(script: str) -> socket.socket:
            ours, theirs = socket.socketpair()
            start(script, theirs)
            return ours

        yield connect
    gc.collect()
    assert set(os.listdir("/proc/self/fd")) == before
    assert threading.active_count() == 1


@pytest.fixture
def listen() -> Iterator[Callable[[Path], socket.socket]]:
    """Bind a listening socket at a path of any length."""
    sockets = []

    def bind(path: Path) -> socket.socket:
        listening = socket.socket(socket.AF_UNIX)
        sockets.append(listening)
        directory = os.open(path.parent, os.O_PATH)
        listening.bind(f"/proc/self/fd/{directory}/{path.name}")
        os.close(directory)
        listening.listen(0)
        return listening

    yield bind
    for listening in sockets:
        listening.close()


@pytest.fixture
def serve_at(listen: Callable[[Path], socket.socket]) -> Iterator[Callable[[Path, str], None]]:
    """Run a script for the first that connects to a path."""
    with _servers() as start:

        def accept(path: Path, script: str) -> None:
            script = "peer, _ = peer.accept()\n" + script
            start(script, listen(path))

        yield accept
