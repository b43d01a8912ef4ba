"""Runs what the nested tests' harness asks for, over a virtio serial port; standard library only.

A line of JSON each way. The harness says `{"id", "argv", "timeout_s", "environment"}`; the answers
are `{"id", "out"}` (a piece of stdout and stderr, base64) and at last `{"id", "status"}`, which is
null when the command did not end in time and was killed. At its start the agent says `{"boot"}`,
the boot's id.
"""

import base64
import json
import os
import select
import signal
import subprocess
import time
from pathlib import Path

PORT = "/dev/virtio-ports/kvmsec.agent"


def main() -> None:
    while not os.path.exists(PORT):
        time.sleep(0.1)
    port = os.open(PORT, os.O_RDWR | os.O_CLOEXEC)
    say(port, boot=Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    heard = b""
    while True:
        piece = os.read(port, 65536)
        if not piece:  # Nobody is at the other end.
            time.sleep(0.1)
        heard += piece
        while b"\n" in heard:
            line, heard = heard.split(b"\n", 1)
            order = json.loads(line)
            try:
                status = run(port, order)
            except OSError as error:
                say(port, id=order["id"], out=encoded(f"{error}\n".encode()))
                status = 127
            say(port, id=order["id"], status=status)


def run(port: int, order: dict) -> int | None:
    """Run a command in a session of its own; whatever it says is passed on as it comes."""
    process = subprocess.Popen(
        order["argv"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd="/root",
        env={**os.environ, "HOME": "/root", "LC_ALL": "C.UTF-8", **order["environment"]},
        start_new_session=True,
    )
    assert process.stdout is not None
    end = time.monotonic() + order["timeout_s"]
    # What a command leaves running may keep its output open: the end is the command's own.
    ended = os.pidfd_open(process.pid)
    out = process.stdout.fileno()
    is_open = True
    try:
        while True:
            watched = [ended, *([out] if is_open else [])]
            ready = select.select(watched, [], [], max(0.0, end - time.monotonic()))[0]
            if out in ready:
                piece = os.read(out, 49152)
                is_open = bool(piece)
                say(port, id=order["id"], out=encoded(piece))
            elif ended in ready:
                return process.wait()
            elif not ready:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return None
    finally:
        os.close(ended)
        process.stdout.close()


def encoded(piece: bytes) -> str:
    return base64.b64encode(piece).decode()


def say(port: int, **what: object) -> None:
    rest = json.dumps(what).encode() + b"\n"
    while rest:
        rest = rest[os.write(port, rest) :]


if __name__ == "__main__":
    main()
