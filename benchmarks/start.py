"""Start to ready, forced stop and the command line, beside raw QEMU in the same run.

Medians with p10 and p90 and ratios: absolute times drift on a shared machine. Root; runs in
namespaces of its own and leaves nothing.

usage: python benchmarks/start.py [ROUNDS]
"""

import asyncio
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _sandbox import enter, spread

from hypervisor.features import find_qemu
from hypervisor.tiny import rom_path
from kvmsec import Node, definition_from
from kvmsec.cluster import operations
from uidpool import provision
from uidpool.ranges import UidRanges
from uidpool.snapshot import Snapshot

POOL = UidRanges.parse("200000-200099")
KVMSEC = Path(sys.executable).with_name("kvmsec")


def main() -> None:
    enter()
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 21
    with tempfile.TemporaryDirectory(dir="/run") as root:
        provision.apply(provision.plan(POOL, Snapshot.read()))
        asyncio.run(measure(Path(root), rounds))
        command_line(Path(root), rounds)


async def measure(root: Path, rounds: int) -> None:
    marks: dict[str, float] = {}
    node = Node(root, on_step=lambda step: marks.update({step: time.perf_counter()}))
    node.host.paths.make_directories()
    await operations.init(node.host.store, node, "bench", uid_pool=POOL)
    disk = root / "disk.img"
    disk.write_bytes(bytes(1 << 20))
    qemu = find_qemu(None, None)
    starts: dict[str, list[float]] = {"raw": [], "library": [], "jail": []}
    stops: dict[str, list[float]] = {"raw": [], "library": []}
    for _ in range(rounds + 1):
        ready, stopped = raw_start_and_stop(qemu, disk, root)
        starts["raw"].append(ready)
        stops["raw"].append(stopped)
        definition = definition_from(
            {
                "memory_mib": 1,
                "firmware": str(rom_path()),
                "disks": [{"path": str(disk)}],
                "accelerator": "auto",
            },
            "bench",
            source="the benchmark",
        )
        begin = time.perf_counter()
        await node.start(definition)
        starts["library"].append(marks["verify"] - begin)
        starts["jail"].append(marks["verify"] - marks["fork"])
        begin = time.perf_counter()
        await node.stop("bench", force=True)
        stops["library"].append(time.perf_counter() - begin)
    await node.close()
    await operations.destroy(node.host.store, [node])
    for times in (*starts.values(), *stops.values()):
        del times[0]  # the first start asks QEMU for its features
    report(starts, stops)


def report(starts: dict[str, list[float]], stops: dict[str, list[float]]) -> None:
    raw = statistics.median(starts["raw"])
    print("start to the qmp_capabilities reply, one raw disk")
    print(f"  raw QEMU, from the fork      {spread(starts['raw'])}")
    for name, words in (
        ("library", "library, from the call  "),
        ("jail", "library, from the fork  "),
    ):
        print(
            f"  {words}     {spread(starts[name])}  x {statistics.median(starts[name]) / raw:.2f}"
        )
    over = statistics.median(stops["library"]) - statistics.median(stops["raw"])
    print("forced stop")
    print(f"  raw kill and wait            {spread(stops['raw'])}")
    print(f"  library, until the uid is clean {spread(stops['library'])}  + {over * 1e3:.1f} ms")


def raw_start_and_stop(qemu: Path, disk: Path, root: Path) -> tuple[float, float]:
    """Start QEMU with nothing around it and kill it; both in seconds."""
    path = root / "raw.sock"
    argv = [str(qemu), "-M", "pc", "-m", "1", "-nodefaults", "-display", "none", "-S"]
    argv += ["-accel", "kvm" if os.path.exists("/dev/kvm") else "tcg", "-bios", str(rom_path())]
    argv += ["-drive", f"file={disk},format=raw,if=virtio"]
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        fd = listener.fileno()
        argv += [
            "-chardev",
            f"socket,id=q,fd={fd},server=on,wait=off",
            "-mon",
            "chardev=q,mode=control",
        ]
        begin = time.perf_counter()
        child = subprocess.Popen(argv, pass_fds=(fd,), stderr=subprocess.DEVNULL)
    with socket.socket(socket.AF_UNIX) as client, client.makefile("rb") as answers:
        client.connect(str(path))
        answers.readline()
        client.sendall(b'{"execute": "qmp_capabilities"}\n')
        answers.readline()
        ready = time.perf_counter() - begin
    begin = time.perf_counter()
    child.kill()
    child.wait()
    path.unlink()
    return ready, time.perf_counter() - begin


def command_line(root: Path, rounds: int) -> None:
    print("command line, wall clock of the whole process")
    for words in (["--help"], ["instance", "list"]):
        times = []
        for _ in range(rounds):
            begin = time.perf_counter()
            argv = [str(KVMSEC), "--root", str(root), *words]
            subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
            times.append(time.perf_counter() - begin)
        print(f"  kvmsec {' '.join(words):22}{spread(times)}")


if __name__ == "__main__":
    main()
