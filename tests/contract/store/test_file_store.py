"""The file store's own promises: whole or untouched, whatever happens to its file or its writer."""

import json
import signal
import stat
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from attrs import evolve

from kvmsec.errors import StoreNotWritten, StoreTooNew, StoreUnreadable
from kvmsec.linux.children import run_in_child
from kvmsec.linux.credentials import Credentials
from kvmsec.linux.errors import ChildFailed, LockBusy
from kvmsec.linux.locks import FileLock
from kvmsec.model.cluster import FORMAT, Cluster, Member, Role
from kvmsec.store import file as file_store
from kvmsec.store.file import FileStore
from uidpool.ranges import EMPTY, UidRanges

NODE = UUID(int=1)
FILES = ["cluster.json", "cluster.lock", "node.json"]
MEMBER = {
    "name": "node1",
    "uuid": str(NODE),
    "address": "node1",
    "port": 1811,
    "role": "candidate",
    "certificates": [],
    "is_leaving": False,
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "cluster.json"


def a_cluster(pool: str = "1000-1010") -> Cluster:
    return Cluster(
        name="trial",
        uuid=uuid4(),
        uid_pool=UidRanges.parse(pool),
        draining=EMPTY,
        security_model=None,
        nodes=(Member("node1", uuid=NODE, address="node1", role=Role.CANDIDATE),),
        master=NODE,
        created_at=datetime(2026, 11, 21, tzinfo=UTC),
    )


def written(place: Path) -> Any:
    FileStore(place).save(a_cluster(), 0)
    return json.loads(place.read_text())


def test_the_file_is_the_owners_alone_and_nothing_else_is_left(place: Path) -> None:
    store = FileStore(place)
    cluster = a_cluster()
    store.save(cluster, store.save(cluster, 0))

    for path in (place, place.with_name("node.json")):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert sorted(path.name for path in place.parent.iterdir()) == FILES


BROKEN = {
    "empty": "",
    "not JSON": "cluster: trial",
    "a list": "[]",
    "nothing in it": "{}",
    "no revision": '{"format": 1, "cluster": {}}',
    "a revision that is none": '{"format": 1, "revision": true, "cluster": {}}',
    "a format that never was": '{"format": 0, "revision": 1, "cluster": {}}',
    "no cluster": '{"format": 1, "revision": 1}',
    "an empty cluster": '{"format": 1, "revision": 1, "cluster": {}}',
    "nested for ever": "[" * 100_000,
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
def test_a_garbled_file_is_named_and_never_overwritten(place: Path, content: str) -> None:
    place.write_text(content)
    refuse_to_touch(place)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("uid_pool", "5-3"),
        ("uid_pool", "0"),
        ("uid_pool", 1000),
        ("draining", "1005"),
        ("security_model", "root"),
        ("name", "../x"),
        ("uuid", "x"),
        ("created_at", "2026-11-21T00:00:00"),
        ("nodes", [{**MEMBER, "name": "-x"}]),
        ("nodes", [{**MEMBER, "role": "master"}]),
        ("nodes", [{**MEMBER, "role": "plain"}]),
        ("nodes", [{**MEMBER, "address": "a b"}]),
        ("nodes", [{**MEMBER, "port": 0}]),
        ("nodes", [{**MEMBER, "is_leaving": True}]),
        ("nodes", [{**MEMBER, "certificates": ["AB"]}]),
        ("nodes", [{**MEMBER, "colour": "red"}]),
        ("nodes", [MEMBER, MEMBER]),
        ("nodes", []),
        ("nodes", None),
        ("master", str(UUID(int=9))),
        ("colour", "red"),
    ],
)
def test_a_value_that_no_release_wrote_is_named_and_never_overwritten(
    place: Path, key: str, value: object
) -> None:
    envelope = written(place)
    envelope["cluster"][key] = value
    place.write_text(json.dumps(envelope))
    refuse_to_touch(place)


def test_a_file_cut_short_anywhere_is_never_taken_for_a_state(place: Path) -> None:
    written(place)
    whole = place.read_bytes()
    for length in range(len(whole.rstrip())):
        place.write_bytes(whole[:length])
        with pytest.raises(StoreUnreadable):
            FileStore(place).load()


def test_a_directory_in_the_files_place_is_an_error(place: Path) -> None:
    place.mkdir()
    with pytest.raises(StoreUnreadable):
        FileStore(place).load()


def refuse_to_touch(place: Path) -> None:
    before = place.read_bytes()
    store = FileStore(place)
    with pytest.raises(StoreUnreadable) as caught:
        store.load()
    assert str(place) in caught.value.message
    assert caught.value.hint is not None
    for revision in (0, 1):
        with pytest.raises(StoreUnreadable):
            store.save(a_cluster(), revision)
        with pytest.raises(StoreUnreadable):
            store.delete(a_cluster(), revision)
    assert place.read_bytes() == before


def test_a_file_of_a_later_release_is_named_and_never_overwritten(place: Path) -> None:
    place.write_text(json.dumps({"format": FORMAT + 1, "state": "of another shape"}))
    before = place.read_bytes()
    store = FileStore(place)

    with pytest.raises(StoreTooNew) as caught:
        store.load()
    assert (caught.value.found, caught.value.known) == (FORMAT + 1, FORMAT)
    with pytest.raises(StoreTooNew):
        store.save(a_cluster(), 0)
    assert place.read_bytes() == before


@pytest.mark.root
def test_a_full_disk_leaves_the_old_state(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "small", small], check=True)
    try:
        store = FileStore(small / "cluster.json")
        cluster = a_cluster()
        revision = store.save(cluster, 0)
        fill(small / "ballast")

        many = ",".join(str(uid) for uid in range(1000, 9000, 2))
        with pytest.raises(StoreNotWritten, match="No space left"):
            store.save(a_cluster_like(cluster, many), revision)
        assert store.load() == (cluster, revision)
        assert not list(small.glob(".*"))

        (small / "ballast").unlink()
        assert store.save(cluster, revision) > revision
    finally:
        subprocess.run(["umount", small], check=True)


def test_what_could_not_be_read_again_is_not_written(place: Path) -> None:
    store = FileStore(place)
    cluster = a_cluster()
    revision = store.save(cluster, 0)
    scattered = UidRanges(tuple((uid, uid) for uid in range(1_000_000, 1_300_000, 2)))

    with pytest.raises(StoreNotWritten, match="could not be read again"):
        store.save(evolve(cluster, uid_pool=scattered), revision)
    assert store.load() == (cluster, revision)


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as ballast:
        try:
            while ballast.write(b"x" * 4096):
                pass
        except OSError:
            return


def a_cluster_like(cluster: Cluster, pool: str) -> Cluster:
    return evolve(cluster, uid_pool=UidRanges.parse(pool))


@pytest.mark.root
def test_whoever_is_not_root_is_told_so(place: Path) -> None:
    written(place)
    with pytest.raises(ChildFailed) as caught:
        run_in_child(
            lambda: FileStore(place).load()[1],
            what="reading the store",
            credentials=Credentials(240001, 240001),
            timeout_s=10,
        )
    assert caught.value.kind == "NotRoot"


def test_what_a_killed_writer_left_is_removed_by_the_next(place: Path) -> None:
    leftover = place.with_name(f".{place.name}.0123456789abcdef")
    leftover.write_text('{"format": 1')
    FileStore(place).save(a_cluster(), 0)

    assert not leftover.exists()


def test_a_store_that_somebody_keeps_locked_is_not_waited_for_for_ever(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_store, "_LOCK_TIMEOUT_S", 0.05)
    with FileLock(place.with_suffix(".lock")), pytest.raises(LockBusy):
        FileStore(place).save(a_cluster(), 0)
    assert FileStore(place).load() == (None, 0)


WRITER = """
import sys
from pathlib import Path
from attrs import evolve
from kvmsec.errors import Conflict
from kvmsec.store.file import FileStore
from uidpool.ranges import UidRanges

store = FileStore(Path(sys.argv[1]))
print("ready", flush=True)
for uid in sys.argv[2:]:
    while True:
        cluster, revision = store.load()
        new = evolve(cluster, uid_pool=cluster.uid_pool | UidRanges.parse(uid))
        try:
            store.save(new, revision)
            break
        except Conflict:
            continue
"""


def start_writer(place: Path, uids: range) -> subprocess.Popen[str]:
    argv = [sys.executable, "-c", WRITER, str(place), *map(str, uids)]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)


def test_rival_processes_lose_no_change(place: Path) -> None:
    store = FileStore(place)
    store.save(a_cluster("1000"), 0)
    shares = [range(2000 + 100 * share, 2025 + 100 * share) for share in range(4)]
    writers = [start_writer(place, share) for share in shares]

    assert [writer.wait(60) for writer in writers] == [0, 0, 0, 0]
    cluster, revision = store.load()
    assert cluster is not None
    assert revision == 1 + sum(len(share) for share in shares)
    assert all(uid in cluster.uid_pool for share in shares for uid in share)
    for writer in writers:
        assert writer.stdout is not None
        writer.stdout.close()


def test_a_writer_killed_at_any_moment_leaves_a_whole_state(place: Path) -> None:
    store = FileStore(place)
    store.save(a_cluster("1000"), 0)
    for round_ in range(5):
        seen = store.load()[1]
        with start_writer(place, range(10_000, 20_000, 2)) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "ready\n"
            while store.load()[1] < seen + 1 + round_:
                assert writer.poll() is None
            writer.send_signal(signal.SIGKILL)
        cluster, revision = store.load()
        assert cluster is not None
        assert store.save(cluster, revision) == revision + 1
    assert sorted(path.name for path in place.parent.iterdir()) == FILES
