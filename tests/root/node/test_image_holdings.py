"""What says which images are open, for all roots: it counts as long as they may be, not longer."""

import os
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from attrs import evolve

from hypervisor.machine import Machine
from kvmsec.agent import InstanceState
from kvmsec.linux.processes import ProcessId, identify, myself
from kvmsec.model.security import SecurityModel
from kvmsec.node import image_holdings, records
from kvmsec.node.image_holdings import HoldingUnreadable
from kvmsec.node.records import ImageUse, InstanceRecord
from kvmsec.paths import Paths

pytestmark = pytest.mark.root


@pytest.fixture
def paths(tmp_path: Path) -> Iterator[Paths]:
    made = Paths(tmp_path / "holder")
    made.make_directories()
    yield made
    for path in made.image_holdings.iterdir():
        path.unlink()


@pytest.fixture
def other(tmp_path: Path) -> Paths:
    made = Paths(tmp_path / "other")
    made.make_directories()
    return made


@pytest.fixture
def gone() -> ProcessId:
    """A process that has ended."""
    with subprocess.Popen(["sleep", "60"]) as process:
        known = identify(process.pid)
        process.kill()
    assert known is not None
    return known


def record_of(**changes: object) -> InstanceRecord:
    plain = InstanceRecord(
        name="web",
        generation="0" * 15 + "a",
        state=InstanceState.STARTING,
        model=SecurityModel.POOL,
        machine=Machine(name="web"),
        launcher=myself(),
        created_at=datetime.now(UTC),
        images=(ImageUse("1:2", "/disk", is_written=True),),
    )
    return evolve(plain, **changes)


def held(other: Paths) -> list[str]:
    return [one.instance for one in image_holdings.elsewhere(other)]


def test_a_start_holds_its_images_before_there_is_a_process(paths: Paths, other: Paths) -> None:
    image_holdings.publish(paths, record_of())
    assert held(other) == ["web"]
    assert held(paths) == [], "a root knows of its own by their records"
    image_holdings.withdraw(paths, record_of())
    assert held(other) == []


def test_an_instance_without_images_holds_none(paths: Paths) -> None:
    image_holdings.publish(paths, record_of(images=()))
    assert list(paths.image_holdings.iterdir()) == []


def test_a_process_holds_them_after_its_launcher_and_without_a_record(
    paths: Paths, other: Paths, gone: ProcessId
) -> None:
    image_holdings.publish(paths, record_of(launcher=gone, process=myself()))
    assert held(other) == ["web"]


@pytest.mark.parametrize("has_process", [False, True])
def test_who_is_gone_holds_them_while_its_record_is_there(
    paths: Paths, other: Paths, gone: ProcessId, has_process: bool
) -> None:
    record = record_of(launcher=gone, process=gone if has_process else None)
    paths.instance("web").make()
    records.save(paths, record)
    image_holdings.publish(paths, record)
    assert image_holdings.remove_stale(paths) == []
    assert held(other) == ["web"]
    records.save(paths, evolve(record, generation="b" * 16))  # Started again since.
    assert held(other) == []
    assert list(paths.image_holdings.iterdir()) == []


def test_a_root_that_is_gone_holds_nothing_for_ever(
    paths: Paths, other: Paths, gone: ProcessId
) -> None:
    image_holdings.publish(paths, record_of(launcher=gone))
    assert held(other) == []
    assert list(paths.image_holdings.iterdir()) == []


def test_another_boot_holds_nothing(paths: Paths, other: Paths) -> None:
    image_holdings.publish(paths, record_of(launcher=evolve(myself(), boot_id="another")))
    assert held(other) == []


def test_only_its_own_stale_ones_are_a_roots_to_remove(
    paths: Paths, other: Paths, gone: ProcessId
) -> None:
    image_holdings.publish(paths, record_of(launcher=gone))
    assert image_holdings.remove_stale(other) == []
    assert [path.name for path in image_holdings.remove_stale(paths)] == [record_of().generation]


@pytest.mark.parametrize("kind", ["fifo", "link", "foreign"])
def test_what_somebody_else_put_where_a_root_was_is_no_record(
    paths: Paths, other: Paths, gone: ProcessId, kind: str, tmp_path: Path
) -> None:
    record = record_of(launcher=gone)
    paths.instance("web").make()
    at = paths.instance("web").record
    if kind == "fifo":
        os.mkfifo(at)
    elif kind == "link":
        at.symlink_to("/dev/zero")
    else:
        records.save(paths, record)
        os.chown(at, 12345, 12345)
    image_holdings.publish(paths, record)
    assert held(other) == []


@pytest.mark.parametrize("content", ["", "{", "[]", '{"root": "/"}', "x" * (2 << 20)])
def test_what_can_not_be_read_keeps_every_image_in_use(
    paths: Paths, other: Paths, content: str
) -> None:
    path = paths.image_holdings / ("c" * 16)
    path.write_text(content)
    with pytest.raises(HoldingUnreadable) as caught:
        image_holdings.elsewhere(other)
    assert "remove the file" in (caught.value.hint or "")


def test_an_unreadable_record_may_be_the_one(paths: Paths, other: Paths, gone: ProcessId) -> None:
    paths.instance("web").make()
    paths.instance("web").record.write_text("{")
    image_holdings.publish(paths, record_of(launcher=gone))
    assert held(other) == ["web"]


def test_what_is_a_roots_own_is_not_read_at_each_start(
    paths: Paths, other: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    image_holdings.publish(other, record_of())
    image_holdings.publish(paths, record_of(generation="b" * 16))
    (paths.image_holdings / ("c" * 16)).write_bytes(
        (paths.image_holdings / ("b" * 16)).read_bytes()
    )
    read: list[str] = []
    original = image_holdings._read
    monkeypatch.setattr(
        image_holdings, "_read", lambda path: read.append(path.name) or original(path)
    )

    assert held(paths) == held(paths) == ["web"]
    assert read == [record_of().generation, "c" * 16, record_of().generation]
    assert image_holdings.remove_stale(paths, ["b" * 16, "c" * 16]) == []
    assert read[3:] == [record_of().generation]


def test_a_generation_is_forgotten_with_its_holding(paths: Paths, other: Paths) -> None:
    image_holdings.publish(paths, record_of())
    image_holdings.withdraw(paths, record_of())
    assert held(paths) == []
    image_holdings.publish(other, record_of())
    assert held(paths) == ["web"]
