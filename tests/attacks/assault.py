"""Carrying the table out: one node, one victim, one attacker, and an answer to each attack."""

import os
import select
import socket
from collections.abc import Callable, Container, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

from attrs import frozen

from firewall.policy import FAMILIES, LOG_BURST, Family, LogSettings
from hypervisor.jail import NETWORK_NAMESPACE, SECCOMP
from kvmsec.errors import KvmsecError
from kvmsec.linux.errors import Fault
from tests.attacks.attack import SUCCEEDED, Attack, Encounter, Locks
from tests.attacks.attacker import Answer, Attacker, Instance, Unconfined
from tests.attacks.encounters import ENCOUNTERS
from tests.attacks.setting import (
    BRIDGE,
    LOG_GROUP,
    SOMEBODY,
    Setting,
    furnished,
    given_to_a_control,
    is_hurt,
    is_taken,
    logged_without_limit,
)
from tests.attacks.stage import Stage
from tests.attacks.table import ATTACKS
from tests.cable import KIND, NODE, PEER, cabled, new_namespace
from tests.kvm.lab import DOMAIN, labs
from tests.log_group import LogGroup

_CALLS: Final = 12
_SILENCE_S: Final = 0.7
"""Longer than two retransmissions of TCP (0.2 and 0.4 s)."""
_LINES_AT_MOST: Final = len(FAMILIES) * (LOG_BURST + LogSettings().per_minute)
"""Of a flood that is over in much less than a minute; iptables counts each family by itself."""
_SECCOMP: Final = frozenset({SECCOMP})


@frozen
class Run:
    """Under what an attacker is put: the model, the packet filter, and which locks are on."""

    model: str
    backend: str
    locks: Locks = "everything"

    def __str__(self) -> str:
        return f"{self.model}-{self.backend}-{self.locks.replace(' ', '-')}"

    @property
    def attacks(self) -> tuple[Attack, ...]:
        return tuple(one for one in ATTACKS if one.expected(self.model, self.locks))

    @property
    def encounters(self) -> tuple[Encounter, ...]:
        return tuple(one for one in ENCOUNTERS if one.expected(self.model, self.locks))

    @property
    def rows(self) -> tuple[Attack | Encounter, ...]:
        return (*self.attacks, *self.encounters)


CONTROL: Final = Run("pool", "nftables", "nothing")


@frozen
class Means:
    """What all runs have in common: hostile programs, and what was found out about QEMU.

    `program` takes orders (main.c); `stand_ins` are those of tests/kvm/hostile.
    """

    program: Path
    stand_ins: Path
    accelerator: str
    features: Path


def carry_out(run: Run, means: Means, names: Container[str]) -> dict[str, Answer]:
    """The attacks of these names, on a node of the run's own; the node is as before afterwards."""
    attacks = tuple(one for one in run.attacks if one.name in names)
    encounters = tuple(one for one in run.encounters if one.name in names)
    security = {"security_model": run.model}
    if run.model == "user":
        security["security_domain"] = DOMAIN
    firewall = f'[firewall]\nbackend = "{run.backend}"\nlog_group = {LOG_GROUP}\n'
    config = f"[uids]\nreuse_delay_s = 0\n{firewall}"
    with ExitStack() as ends:
        ends.enter_context(new_namespace())
        net = ends.enter_context(cabled())
        net.sh("ip", "link", "set", "lo", "up")
        net.sh("ip", "link", "add", BRIDGE, "type", "bridge")
        lab = ends.enter_context(labs(means.accelerator, means.features))(config)
        setting = ends.enter_context(furnished(lab, net, means.program, **security))
        stage = Stage(setting, means.stand_ins, config, security, _left_out(run))
        if run.locks == "nothing":
            ends.enter_context(logged_without_limit(net, SOMEBODY))
            answers = _Controls(setting).try_all(attacks)
        else:
            answers = _attack_from_inside(run, attacks, setting, security)
        is_control = run.locks == "nothing"
        return answers | {
            one.name: stage.carry_out(one, is_control=is_control) for one in encounters
        }


def _left_out(run: Run) -> frozenset[str]:
    """The locks that an instance of this run is without."""
    # The filter refuses some sockets by itself: it would hide what the two other locks do.
    dropped = frozenset() if run.locks in ("everything", "the uid alone", "nothing") else _SECCOMP
    if run.locks == "the packet rules alone":
        dropped |= {NETWORK_NAMESPACE}
    return dropped


def _attack_from_inside(
    run: Run, attacks: tuple[Attack, ...], setting: Setting, security: dict[str, str]
) -> dict[str, Answer]:
    lab = setting.lab
    definition = lab.definition(
        "attacker",
        qemu=str(setting.program),
        disks=[{"path": str(lab.disk("attacker.raw"))}],
        nics=[{"bridge": BRIDGE}],
        **security,
    )
    with _inheritable_socket():
        attacker = lab.run(lambda node: node.start(definition), without_locks=_left_out(run))
    try:
        if run.locks == "the network namespace alone":
            lab.run(lambda node: node.remove_rules(force=True))
        facts = setting.facts(attacker, "/output")
        interplay = Interplay(setting, has_rules=run.locks == "the packet rules alone")
        if run.locks == "the uid alone":
            with Unconfined(setting.program, uid=attacker.uid) as escaped:
                return interplay.try_all(escaped, attacks, facts)
        with Instance(lab.paths.instance("attacker").serial_socket) as inside:
            return interplay.try_all(inside, attacks, facts)
    finally:
        lab.stop("attacker")


@contextmanager
def _inheritable_socket() -> Iterator[None]:
    """What a careless library of the launcher's leaves open: a connection that may send."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as careless:
        careless.connect((PEER["ipv4"], 5000))
        os.set_inheritable(careless.fileno(), True)
        yield


@frozen
class Interplay:
    """What others do while an attack waits for it, and what only they can see."""

    setting: Setting
    has_rules: bool = False

    def try_all(
        self, attacker: Attacker, attacks: tuple[Attack, ...], facts: dict[str, object]
    ) -> dict[str, Answer]:
        return {one.name: self.try_one(attacker, one.order.format_map(facts)) for one in attacks}

    def try_one(self, attacker: Attacker, order: str) -> Answer:
        what, *words = order.split()
        family: Family = "ipv6" if words and ":" in words[0] else "ipv4"
        if what == "leave-orphan" and self.has_rules:
            # Its connection is from before the rules; with them there could be none.
            self.setting.lab.run(lambda node: node.remove_rules(force=True))
        answer = attacker.order(order)
        if not answer.is_ready:
            return answer
        act: Callable[[], Answer] = {
            "be-called": lambda: self._call(attacker, "ipv4" if "ipv4" in words else family),
            "be-called-by-node": lambda: self._call_on_loopback(attacker, family, words[0]),
            "be-told": lambda: self._tell(attacker, family),
            "be-told-by-node": lambda: self._tell_on_loopback(attacker, family, words[0]),
            "answer-by-cookie": lambda: self._call_often(attacker, family),
            "leave-orphan": lambda: self._take_orphan(attacker, family),
            "flood-log": lambda: self._count_lines(attacker),
            "drop-locks": lambda: self._use_what_it_held(attacker),
        }.get(what, lambda: self._look_at_victim(attacker, what.removeprefix("drain-"), answer))
        return act()

    def _call(self, attacker: Attacker, family: Family) -> Answer:
        with self.setting.net.dial(family, 6000):
            return attacker.go_on()

    def _call_on_loopback(self, attacker: Attacker, family: Family, address: str) -> Answer:
        with socket.socket(KIND[family]) as dialler:
            dialler.setblocking(False)
            dialler.connect_ex((address, 6000))
            return attacker.go_on()

    def _tell(self, attacker: Attacker, family: Family) -> Answer:
        with self.setting.net.at_peer():
            teller = socket.socket(KIND[family], socket.SOCK_DGRAM)
        with teller:
            teller.sendto(b"x", (NODE[family], 6000))
            return attacker.go_on()

    def _tell_on_loopback(self, attacker: Attacker, family: Family, address: str) -> Answer:
        with socket.socket(KIND[family], socket.SOCK_DGRAM) as teller:
            teller.sendto(b"x", (address, 6000))
            return attacker.go_on()

    def _call_often(self, attacker: Attacker, family: Family) -> Answer:
        dialled = [self.setting.net.dial(family, 6000) for _ in range(_CALLS)]
        attacker.go_on()
        return _arrived(dialled)

    def _take_orphan(self, attacker: Attacker, family: Family) -> Answer:
        calls = list(_pending(self.setting.listeners[family]))
        if self.has_rules:
            self.setting.lab.run(lambda node: node.apply_rules())
        attacker.go_on()
        return _arrived(calls)

    def _count_lines(self, attacker: Attacker) -> Answer:
        if self.has_rules:
            # With an allowance that no attack before has used up: that there is a log must be seen.
            self.setting.lab.run(lambda node: node.remove_rules(force=True))
            self.setting.lab.run(lambda node: node.apply_rules())
        with LogGroup(LOG_GROUP) as log:
            answer = attacker.go_on()
            lines = len(log.receive_all(_SILENCE_S))
        if answer.word != SUCCEEDED:
            return answer
        said = f"{answer.found}, in {lines} lines"
        if lines == 0:
            return Answer("UNLOGGED", said)
        return Answer("LIMITED" if lines <= _LINES_AT_MOST else SUCCEEDED, said)

    def _look_at_victim(self, attacker: Attacker, what: str, drained: Answer) -> Answer:
        hurt = is_hurt(self.setting, what)
        attacker.go_on()
        return Answer(SUCCEEDED if hurt else "UNHURT", drained.found)

    def _use_what_it_held(self, attacker: Attacker) -> Answer:
        """Its image for another instance, its name for another start, its uid for another lease."""
        lab = self.setting.lab
        disks = [{"path": str(lab.root / "attacker.raw")}]
        taken = [
            name
            for name, machine in (("rival", {"disks": disks}), ("attacker", {}))
            if _starts(lab, name, machine)
        ]
        attacker.go_on()
        return Answer("HELD", "") if not taken else Answer(SUCCEEDED, f"started {taken}")


def _starts(lab: Any, name: str, machine: dict[str, Any]) -> bool:
    try:
        lab.start(name, **machine)
    except (KvmsecError, Fault):
        return False
    lab.stop(name)
    return True


def _pending(listener: socket.socket) -> Iterator[socket.socket]:
    while select.select([listener], [], [], 0)[0]:
        yield listener.accept()[0]


def _arrived(sockets: list[socket.socket]) -> Answer:
    """Whether anything is read from these before all have been silent for a while."""
    total, left = 0, set(sockets)
    while left and (ready := select.select(list(left), [], [], _SILENCE_S)[0]):
        for one in ready:
            try:
                chunk = one.recv(1 << 16)
            except OSError:
                chunk = b""  # Refused: nobody listens there.
            total += len(chunk)
            left -= set() if chunk else {one}
    for one in sockets:
        one.close()
    return Answer(SUCCEEDED, f"{total} bytes arrived") if total else Answer("UNSENT", "")


@frozen
class _Controls:
    """The same attacks by who is not confined at all."""

    setting: Setting

    def try_all(self, attacks: tuple[Attack, ...]) -> dict[str, Answer]:
        return {one.name: self._try_one(one) for one in attacks}

    def _try_one(self, attack: Attack) -> Answer:
        setting, control = self.setting, attack.control
        uid = {"root": None, "somebody": SOMEBODY, "victim": setting.victim.uid}[control.attacker]
        order = (control.order or attack.order).format_map(
            setting.facts(None, str(setting.scratch))
        )
        root = setting.scratch if control.changes_root else None
        with (
            given_to_a_control(setting) as given,
            Unconfined(setting.program, uid=uid, root=root, give=given) as unconfined,
        ):
            if attack.name == "drop-locks":
                assert is_taken(setting.scratch / "locked")
                unconfined.order(order)
                is_free = not is_taken(setting.scratch / "locked")
                unconfined.go_on()
                return Answer(SUCCEEDED if is_free else "HELD", "")
            return Interplay(setting).try_one(unconfined, order)
