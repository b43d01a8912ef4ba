"""Three real guests, each under a uid of its own, and what somebody who took one over can reach.

Drives the `kvmsec` command as a person would, with all files below a root of its own, and leaves
the host as it was, whatever interrupts it. Needs root. `./dev demo` runs it.
"""

import json
import os
import pwd
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Final

from attacks import Tried, attempts_on, packet_attempts, try_all
from host_state import HOST_DIRECTORIES, HostState, remove_host_directories
from screen import heading, say, table

from hypervisor import tiny

KVMSEC: Final = Path(sys.prefix, "bin/kvmsec")
NAMES: Final = ("web", "db", "mail")
UIDS: Final = 10
DEADLINE_S: Final = 120
CHECK_FOUND_ERRORS: Final = 3


class DemoFailed(Exception):
    """Something did not go as it should; the message says what."""


# The demo ------------------------------------------------------------------------------------


class Demo:
    """One run: the root that it works below, and what it has to take back."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.before = HostState.read(root)
        self.uids = range(0)
        self.has_cluster = False
        self.started: list[str] = []
        self.bare: subprocess.Popen[bytes] | None = None
        self.accelerator = "kvm"
        self.problems: list[str] = []

    # Commands

    def run(self, *words: str) -> str:
        """A command with its words as a shell user would see them; raises DemoFailed."""
        status, told, complaint = self.attempt(*words)
        if status:
            raise DemoFailed(f"kvmsec {shlex.join(words)}: {complaint.strip() or status}")
        return told

    def attempt(self, *words: str) -> tuple[int, str, str]:
        """The same for a command that may fail: its status, its words, its complaint."""
        say(f"$ kvmsec {shlex.join(words)}")
        status, told, complaint = self._execute([str(KVMSEC), *words])
        for line in (told + complaint).splitlines():
            say(f"  {line}")
        return status, told, complaint

    def _execute(self, argv: Sequence[str]) -> tuple[int, str, str]:
        # In a session of its own: Ctrl-C is ours to pass on, and then its undoing is waited for.
        process = subprocess.Popen(
            list(argv),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "KVMSEC_ROOT": str(self.root)},
            cwd=self.root,
            start_new_session=True,
        )
        try:
            told, complaint = process.communicate(timeout=DEADLINE_S)
        except BaseException:
            process.send_signal(signal.SIGINT)
            process.communicate()
            raise
        return process.returncode, told, complaint

    def ask(self, *words: str) -> Any:
        """What a command says to machines; not shown."""
        status, told, complaint = self._execute([str(KVMSEC), *words, "--json"])
        if status not in (0, CHECK_FOUND_ERRORS):
            raise DemoFailed(f"kvmsec {shlex.join(words)} --json: {complaint.strip()}")
        return json.loads(told)

    # Steps, in their order

    def look_at_the_host(self) -> None:
        heading("Is this host ready?")
        say("$ kvmsec doctor --json")
        findings = self.ask("doctor")
        told = [one for one in findings if one["severity"] != "ok" or one["code"] == "kvm"]
        for finding in told:
            say(f"  {finding['severity']:<8} {finding['item']}: {finding['message']}")
        say(f"  … and {len(findings) - len(told)} more findings, all ok")
        failed = {one["code"] for one in findings if one["severity"] == "error"}
        if failed - {"kvm"}:
            raise DemoFailed("this host is not ready: `kvmsec doctor` says what to do")
        runs_kvm = any(one["code"] == "kvm" and one["severity"] == "ok" for one in findings)
        self.accelerator = "kvm" if runs_kvm else "tcg"
        says = {
            "kvm": "REAL KVM: a guest booted under it, so the guests below run under it, too.",
            "tcg": "NO KVM on this host: the guests below are emulated (TCG).",
        }
        say(f"\n  {says[self.accelerator]}")

    def make_a_cluster(self) -> None:
        heading("A pool of uids, one for each instance")
        self.uids = self._free_range()
        self.run("uids", "provision", self.pool)
        self.has_cluster = True
        self.run("cluster", "init", "--name", "demo", "--uid-pool", self.pool)

    @property
    def pool(self) -> str:
        return _pool_of(self.uids)

    def _free_range(self) -> range:
        """Uids that nobody has here, and that kvmsec would take.

        At random, so that the uids of a container or of another demo are hardly met.
        """
        taken = {user.pw_uid for user in pwd.getpwall()}
        for first in random.sample(range(300_000, 500_000, 100), k=20):
            uids = range(first, first + UIDS)
            argv = [str(KVMSEC), "uids", "provision", _pool_of(uids), "--dry-run"]
            if taken.isdisjoint(uids) and self._execute(argv)[0] == 0:
                return uids
        raise DemoFailed("no free range of uids was found in 300000-500000")

    def start_three(self) -> None:
        heading("Three guests, each with a disk of its own")
        say(f"$ cp {tiny.rom_path()} .")
        shutil.copyfile(tiny.rom_path(), self.root / "tiny.rom")
        accelerator = () if self.accelerator == "kvm" else ("--accel", "tcg")
        for name in NAMES:
            say(f"$ truncate -s 1M {name}.raw")
            with (self.root / f"{name}.raw").open("wb") as disk:
                disk.truncate(1 << 20)
            self.started.append(name)
            machine = ("--firmware", "tiny.rom", "--disk", f"{name}.raw", "--memory", "4")
            self.run("instance", "start", name, *machine, *accelerator)
        say()
        self.run("instance", "list")

    def talk(self) -> None:
        heading("A guest answers on its serial line, and writes to its disk")
        path = self.ask("instance", "info", "web")["serial_socket"]
        with socket.socket(socket.AF_UNIX) as line:
            line.settimeout(10)
            line.connect(path)
            for command, wanted in ((b"ehello\n", "ECHO "), (b"w", "WROTE ")):
                line.sendall(command)
                say(f"  > {command.decode().rstrip()}")
                answer = _answer(line, wanted)
                say(f"  < {answer}")
        sector = (self.root / "web.raw").read_bytes()[512:528].decode(errors="replace")
        say(f"  sector 1 of web.raw, as the host sees it: {sector}")

    def refuse_packets(self) -> None:
        served = 0
        for backend in ("nftables", "iptables"):
            heading(f"Nothing that web's uid sends leaves it: {backend}")
            config = self.root / "etc/kvmsec/kvmsec.toml"
            config.write_text(f'[firewall]\nbackend = "{backend}"\n')
            config.chmod(0o600)
            say(f"$ printf '[firewall]\\nbackend = \"{backend}\"\\n' > etc/kvmsec/kvmsec.toml")
            if self.attempt("firewall", "apply")[0] != 0:
                say(f"  (this host has no {backend})")
                continue
            served += 1
            self._refuse_packets_by(backend)
        if not served:
            raise DemoFailed("neither nftables nor iptables could be used")

    def _refuse_packets_by(self, backend: str) -> None:
        before = self.ask("firewall", "show")
        if before["backend"] != backend:
            raise DemoFailed(f"{backend} was asked for, and {before['backend']} serves")
        rows = try_all(packet_attempts(), self.ask("instance", "info", "web"))
        after = self.ask("firewall", "show")
        shown = [(row.attempt.what, row.outside, row.as_root) for row in rows]
        table(("tries to", "the kernel's answer", "the same as root"), shown)
        self._judge(rows)
        counts = []
        for family in before["families"]:
            was, now = before["dropped"][family], after["dropped"][family]
            counts.append(f"{family} {was} -> {now}")
            if now <= was and any(
                family in row.attempt.what.lower() and row.is_refused for row in rows
            ):
                self.problems.append(f"the drop counter of {backend} for {family} did not rise")
        say(f"  dropped packets, before -> after: {', '.join(counts)}")

    def attack(self) -> None:
        heading("Suppose that each of them broke out of its guest, and out of QEMU")
        guests = [self.ask("instance", "info", name) for name in NAMES]
        tried = [
            one
            for attacker in guests
            for victim in guests
            if attacker is not victim
            for one in try_all(attempts_on(victim, self.root), attacker, also_in_jail=True)
        ]
        pairs = len(NAMES) * (len(NAMES) - 1)
        say(f"  With each one's uid, each of them tries it on both of the others ({pairs} pairs):")
        say("  in its jail, where QEMU is; out of the jail, in none of its namespaces; as root.\n")
        head = ("tries to", "in its jail", "refused by", "out of it", "refused by", "as root")
        by_kind: dict[str, list[Tried]] = {}
        for one in tried:
            by_kind.setdefault(one.attempt.what, []).append(one)
        table(head, [_row(what, rows) for what, rows in by_kind.items()])
        self._judge(tried)
        refused = sum(one.is_refused for one in tried)
        say(f"\n  {refused} of {len(tried)} attempts refused, each in both places.")
        say("  What else refuses (system calls, limits) is attacked by `./dev test attacks`.")

    def _judge(self, rows: Sequence[Tried]) -> None:
        self.problems += [problem for row in rows for problem in row.problems]

    def audit(self) -> None:
        heading("How well is each confined? And a QEMU that root starts by hand?")
        program = self.ask("instance", "info", "web")["qemu"]
        words = ["-display", "none", "-nodefaults", "-m", "4", "-bios", "tiny.rom"]
        argv = [program, *words, "-accel", self.accelerator]
        say(f"$ {shlex.join(argv)} &")
        self.bare = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=self.root,
            env={**os.environ, "KVMSEC_ROOT": str(self.root)},
            start_new_session=True,
        )
        subjects = {f"instance {name}": [name] for name in NAMES}
        subjects["QEMU by hand"] = ["--pid", str(self.bare.pid)]
        rows, scores = [], []
        for called, whom in subjects.items():
            say(f"$ kvmsec audit {shlex.join(whom)} --json")
            (report,) = self.ask("audit", *whom)
            worst = sorted(report["findings"], key=lambda one: -one["exposure"])
            codes = ", ".join(one["code"] for one in worst[:4] if one["exposure"])
            scores.append(report["score"])
            rows.append((called, f"{report['score']:.1f}", report["rating"], codes))
        say("  0.0 is sealed, 10.0 is open; docs/audit.md has the points\n")
        table(("audited", "score", "rating", "most exposed by"), rows)
        if max(scores[:-1]) >= scores[-1]:
            self.problems.append("an instance is no better confined than a QEMU by hand")
        self._end_bare()

    def _end_bare(self) -> None:
        if self.bare is not None:
            self.bare.kill()
            self.bare.wait()
            self.bare = None

    def stop_all(self) -> None:
        heading("The end: each guest powers down, and its uid rests")
        for name in NAMES:
            self.run("instance", "stop", name, "--timeout", "10")
            self.started.remove(name)
        self.run("uids", "list")

    # And back

    def clean_up(self) -> None:
        """Take everything back; goes on past what fails, and says so."""
        heading("Cleaning up")
        self._end_bare()
        for name in tuple(self.started):
            self._take_back("instance", "stop", name, "--force")
        if self.has_cluster:
            self._take_back("firewall", "remove")
            self._take_back("cluster", "destroy", "--yes")
        if self.uids:
            self._take_back("uids", "provision", self.pool, "--remove")
        say(f"$ rm -r {self.root}")
        try:
            shutil.rmtree(self.root)
            remove_host_directories(self.before)
        except OSError as failure:
            self.problems.append(str(failure))

    def _take_back(self, *words: str) -> None:
        # An interrupted step may not have got as far as this undoes: what counts is the end.
        try:
            self.attempt(*words)
        except subprocess.TimeoutExpired as failure:
            self.problems.append(str(failure))

    def compare(self) -> None:
        """Hold the host against what it was."""
        differences = self.before.differences(HostState.read(self.root, self.uids))
        if differences:
            say("\nThe host is NOT as it was:")
            for difference in differences:
                say(f"  - {difference}")
            self.problems.append("it left something behind")
        else:
            looked_at = ", ".join(HostState.ASPECTS)
            say(f"\nThe host is as it was ({looked_at}).")


def _pool_of(uids: range) -> str:
    return f"{uids[0]}-{uids[-1]}"


def _row(what: str, rows: Sequence[Tried]) -> tuple[str, ...]:
    """The same attempt by and on different guests: one answer, unless something is wrong."""
    attempt = rows[0].attempt
    jailed, outside, root = (
        "/".join(sorted({str(answer) for answer in answers}))
        for answers in zip(*((row.in_jail, row.outside, row.as_root) for row in rows), strict=True)
    )
    return what, jailed, attempt.in_jail.lock, outside, attempt.outside.lock, root


def _answer(line: socket.socket, wanted: str) -> str:
    """The next whole line of the guest's that begins as it should."""
    heard = b""
    while True:
        *lines, heard_last = heard.split(b"\r\n")
        for text in (one.decode(errors="replace") for one in lines):
            if text.startswith(wanted):
                return text
        chunk = line.recv(4096)
        if not chunk:
            raise DemoFailed(f"the serial line was closed after {heard_last!r}")
        heard += chunk


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> int:
    if os.geteuid() != 0:
        sys.stderr.write("demo: needs root: run it as root, or with sudo\n")
        return 1
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    root = Path(tempfile.mkdtemp(prefix="kvmsec-demo-", dir="/var/tmp"))
    demo = Demo(root)
    say(f"$ cd {root}; export KVMSEC_ROOT=$PWD    # all files of the demo, but {_shared()}")
    steps = (
        *(demo.look_at_the_host, demo.make_a_cluster, demo.start_three, demo.talk),
        *(demo.refuse_packets, demo.attack, demo.audit, demo.stop_all),
    )
    try:
        for step in steps:
            step()
    except KeyboardInterrupt:
        demo.problems.append("interrupted")
    except (DemoFailed, OSError, subprocess.TimeoutExpired) as failure:
        demo.problems.append(str(failure))
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        demo.clean_up()
    demo.compare()
    for problem in demo.problems:
        say(f"demo: {problem}")
    return 1 if demo.problems else 0


def _shared() -> str:
    return " and ".join(map(str, HOST_DIRECTORIES))


if __name__ == "__main__":
    sys.exit(main())
