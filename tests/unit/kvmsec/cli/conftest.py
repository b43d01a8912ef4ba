"""A command line whose node is a fake, in a root of its own."""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from kvmsec.agent import Event, Finding, InstanceInfo, InstanceLog, InstanceState, UidState
from kvmsec.cli import session
from kvmsec.cli.main import kvmsec
from kvmsec.errors import UnknownInstance
from kvmsec.model.instance import InstanceDefinition
from uidpool.ranges import UidRanges

Run = Callable[..., Result]


class FakeNode:
    """A node without QEMU: it answers what a test put into it and keeps what it was asked."""

    name = "node1"

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.infos: list[InstanceInfo] = []
        self.stopped: InstanceInfo | None = None
        self.findings: tuple[Finding, ...] = ()
        self.rules: dict[str, Any] = {}
        self.states: tuple[UidState, ...] = ()
        self.logs: list[InstanceLog] = [InstanceLog("", "", "")]
        self.error: BaseException | None = None
        self.is_closed = False

    def asked(self, what: str, *details: Any) -> None:
        self.calls.append((what, details))
        if self.error is not None:
            raise self.error

    async def start(self, definition: InstanceDefinition) -> InstanceInfo:
        self.asked("start", definition)
        return self.infos[0]

    async def stop(
        self, name: str, *, timeout_s: float = 60.0, force: bool = False
    ) -> InstanceInfo:
        self.asked("stop", name, timeout_s, force)
        ended = InstanceInfo(name=name, state=InstanceState.STOPPED, reason="powered down")
        return self.stopped or ended

    async def reboot(self, name: str) -> None:
        self.asked("reboot", name)

    async def list(self) -> tuple[InstanceInfo, ...]:
        self.asked("list")
        return tuple(self.infos)

    async def info(self, name: str) -> InstanceInfo:
        self.asked("info", name)
        for info in self.infos:
            if info.name == name:
                return info
        raise UnknownInstance(name)

    async def events(self) -> AsyncIterator[Event]:
        raise NotImplementedError
        yield

    async def log(self, name: str) -> InstanceLog:
        self.asked("log", name)
        return self.logs.pop(0) if len(self.logs) > 1 else self.logs[0]

    async def uid_states(self, *, with_free: bool = False) -> tuple[UidState, ...]:
        self.asked("uid_states", with_free)
        return self.states

    async def release_uid(self, uid: int) -> UidState:
        self.asked("release_uid", uid)
        return self.states[0]

    async def apply_rules(self) -> None:
        self.asked("apply_rules")

    async def verify_rules(self) -> tuple[Finding, ...]:
        self.asked("verify_rules")
        return self.findings

    async def show_rules(self) -> Mapping[str, Any]:
        self.asked("show_rules")
        return self.rules

    async def remove_rules(self, *, force: bool = False) -> None:
        self.asked("remove_rules", force)

    async def doctor(self) -> tuple[Finding, ...]:
        self.asked("doctor")
        return self.findings

    async def reconcile(self) -> tuple[str, ...]:
        self.asked("reconcile")
        return ()

    async def check_pool(self, uids: UidRanges) -> Sequence[Any]:
        return ()

    async def held_uids(self) -> Mapping[int, str]:
        return {}

    async def running_instances(self) -> Sequence[str]:
        return ()

    async def sync_rules(self) -> None:
        self.asked("sync_rules")

    async def forget_resting(self) -> None:
        self.asked("forget_resting")

    async def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> FakeNode:
    """The node that every command gets; commands believe themselves root."""
    fake = FakeNode()
    monkeypatch.setattr(session, "open_node", lambda root: fake)
    monkeypatch.setattr(session, "is_root", lambda: True)
    return fake


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for place in ("etc/kvmsec/instances", "var/lib/kvmsec"):
        (tmp_path / "root" / place).mkdir(parents=True)
    return tmp_path / "root"


@pytest.fixture
def run(root: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command line below `root`."""
    monkeypatch.delenv("KVMSEC_ROOT", raising=False)

    def invoke(*arguments: str, **options: Any) -> Result:
        return CliRunner().invoke(kvmsec, ["--root", str(root), *arguments], **options)

    return invoke
