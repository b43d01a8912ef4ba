"""Between the master and each node there is at all times a pair that both accept.

Every state that can be reached is visited: from each of them every command is run with every set
of nodes away, and at each of its steps the master may be killed. The key files are the real ones
over a file system in memory, the certificates are real, and so is the judgement.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from attrs import frozen

from kvmsec.cluster.renewal import journal as journal_module
from kvmsec.cluster.renewal import sequence
from kvmsec.cluster.renewal.journal import Direction
from kvmsec.errors import KvmsecError
from kvmsec.model.cluster import Cluster
from kvmsec.pki import files as files_module
from kvmsec.pki.certificates import fingerprint_of
from kvmsec.pki.pems import Pair, split_pems
from tests.unit.kvmsec.cluster.renewal_world import Killed, World, assert_settled, make_world

Files = dict[Path, str]

KEPT = ("client.pem.next", "client.pem.previous", "server.pem.previous")


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Files:
    """The key files and the journal in memory: thousands of states are written and read again."""
    files: Files = {}

    def read(path: Path, **_: Any) -> str | None:
        return files.get(path)

    def remove(path: Path) -> bool:
        return files.pop(path, None) is not None

    for module in (files_module, journal_module):
        monkeypatch.setattr(module, "read_private", read)
        monkeypatch.setattr(module, "write_private", files.__setitem__)
        monkeypatch.setattr(module, "remove_file", remove)
    # Pure functions of a text that is read again and again.
    for name in ("require_whole", "anchors_of", "fingerprint_of", "_require_signed"):
        monkeypatch.setattr(files_module, name, functools.cache(getattr(files_module, name)))
    monkeypatch.setattr(journal_module.Journal, "is_there", lambda self: self.path in files)
    return files


@frozen
class Snapshot:
    """Everything that outlives a kill."""

    files: Files
    state: Cluster
    revision: int
    copies: dict[str, tuple[Cluster, int]]


def snapshot(world: World, disk: Files) -> Snapshot:
    copies = {name: (box.copy, box.revision) for name, box in world.boxes.items()}
    return Snapshot(dict(disk), world.state, world.store.revision, copies)


def restore(world: World, disk: Files, kept: Snapshot) -> None:
    disk.clear()
    disk.update(kept.files)
    world.store.cluster, world.store.revision = kept.state, kept.revision
    for name, (copy, revision) in kept.copies.items():
        world[name].copy, world[name].revision = copy, revision


class Letters:
    """O for what was there at first, N for all else: states that differ in keys alone are one."""

    def __init__(self, world: World) -> None:
        self._old = {box.shown for box in world.boxes.values()}
        self._anchor = fingerprint_of(world.head.keys.anchors())
        self.trusted = functools.cache(self._trusted)
        self.shown = functools.cache(self._shown)

    def counting(self, fingerprints: Iterable[str]) -> str:
        return "".join(sorted("O" if one in self._old else "N" for one in fingerprints))

    def _trusted(self, text: str) -> str:
        return "".join(
            "O" if fingerprint_of(one) == self._anchor else "N" for one in split_pems(text)
        )

    def _shown(self, text: str) -> str:
        return self.counting([fingerprint_of(Pair.parse(text).certificate_pem)])

    def state_of(self, world: World, disk: Files) -> object:
        """What a state comes to: who trusts, shows and lists what, and what the journal knows."""
        boxes = tuple(
            (
                self.trusted(disk[box.keys.directory / "server.pem"]),
                self.shown(disk[box.keys.directory / "client.pem"]),
                tuple(self.counting(member.certificates) for member in box.copy.candidates),
                *(box.keys.directory / name in disk for name in KEPT),
            )
            for box in world.boxes.values()
        )
        renewal = world.journal.load()
        known = renewal and (
            renewal.direction,
            tuple((one.step, one.new is None) for one in renewal.members),
        )
        return boxes, known, tuple(self.counting(one.certificates) for one in world.state.nodes)


class Explorer:
    """Runs each command from each state that is found, and keeps the states on its way."""

    def __init__(
        self, world: World, disk: Files, check: Callable[[], None], away: list[tuple[str, ...]]
    ) -> None:
        self.world, self.disk, self.check, self.away = world, disk, check, away
        self.letters = Letters(world)
        self.seen: set[object] = set()
        self.waiting: list[Snapshot] = []
        self.ends: set[object] = set()

    def look(self, _: str = "") -> None:
        key = self.letters.state_of(self.world, self.disk)
        if key not in self.seen:
            self.seen.add(key)
            self.check()
            self.waiting.append(snapshot(self.world, self.disk))

    def explore(self, first: Callable[[], object], later: list[Callable[[], object]]) -> None:
        start = snapshot(self.world, self.disk)
        self.world.on_step = self.look
        for away in self.away:
            restore(self.world, self.disk, start)
            self.run(first, away)
        while self.waiting:
            kept = self.waiting.pop()
            if self.world.journal.path not in kept.files:
                continue
            restore(self.world, self.disk, kept)
            renewal = self.world.journal.load()
            has_way_back = renewal is not None and renewal.direction is Direction.FORWARD
            for command, away in itertools.product(later if has_way_back else later[:1], self.away):
                restore(self.world, self.disk, kept)
                self.run(command, away)

    def run(self, command: Callable[[], object], away: tuple[str, ...]) -> None:
        for name, box in self.world.boxes.items():
            box.is_up = name not in away
        # Too few nodes, no way back: it stopped, and what it left is looked at.
        with contextlib.suppress(KvmsecError):
            command()
        self.look()
        if not away and self.world.journal.load() is None:
            self.ends.add(self.letters.state_of(self.world, self.disk))


@pytest.mark.parametrize("whole", [True, False])
def test_no_kill_and_no_absence_cuts_a_node_off(
    tmp_path: Path, disk: Files, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    world = make_world(tmp_path, candidates=2, plain=0)
    # So that of two nodes one may be left behind, and be caught up with from each of its states.
    monkeypatch.setattr(sequence, "may_drop", lambda _: True)

    def check() -> None:
        assert world.cut_off() == [], world.steps[-5:]

    explorer = Explorer(world, disk, check, [(), ("n1",)])
    explorer.explore(lambda: world.renew(new_cluster_certificate=whole), [world.go_on, world.abort])

    assert len(explorer.seen) > 100
    # With everybody there, it ends with everything new, or with everything as it was.
    assert len(explorer.ends) == 2


AWAY: list[tuple[str, ...]] = [(), ("n1",), ("n2",)]


@pytest.mark.parametrize("away", AWAY)
@pytest.mark.parametrize("command", ["go on", "abort"])
def test_those_who_were_reached_take_each_other_too(
    tmp_path: Path, disk: Files, away: tuple[str, ...], command: str
) -> None:
    """Killed at each step in turn; forward no candidate is refused by another member, at any."""
    world = make_world(tmp_path, candidates=2, plain=1)
    start = snapshot(world, disk)
    there = [name for name in world.boxes if name not in away]
    for number in itertools.count():
        restore(world, disk, start)
        for name, box in world.boxes.items():
            box.is_up = name not in away
        world.kill_at(number)
        try:
            world.renew(new_cluster_certificate=True)
        except Killed:
            pass
        else:
            break
        assert world.cut_off() == []
        assert world.estranged(there) == [], world.steps[-1]
        for box in world.boxes.values():
            box.is_up = True
        world.let_live()
        renewal = world.journal.load()
        if renewal is None:
            continue
        if command == "abort" and renewal.direction is Direction.FORWARD:
            assert world.abort().is_at_its_end
        else:
            outcome = world.go_on()
            assert outcome is not None and outcome.is_at_its_end
        assert_settled(world)
    assert number > 40
