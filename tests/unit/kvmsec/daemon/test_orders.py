"""The journal of orders: every line whole, whatever a peer writes, and never too many of them."""

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from kvmsec.daemon.orders import Order, OrderJournal, target_of
from kvmsec.rpc import messages as m

FINGERPRINT = "ab" * 32


def order(**values: Any) -> Order:
    known: dict[str, Any] = {
        "peer": "node2",
        "fingerprint": FINGERPRINT,
        "call": "instance.start",
        "target": "web",
        "outcome": "done",
    }
    return Order(**{**known, **values})


class Journal:
    """An order journal in a directory of the test's, its clock and what it complained of."""

    def __init__(self, directory: Path, *, limit_bytes: int = 1 << 20) -> None:
        self.path = directory / "orders.jsonl"
        self.host = directory / "journal"
        self.complaints: list[str] = []
        self.time = 0.0
        self.journal = OrderJournal(
            self.path,
            complain=self.complaints.append,
            limit_bytes=limit_bytes,
            sockets=(str(self.host), str(directory / "log")),
            now=lambda: self.time,
        )

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()]


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path)


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[socket.socket]:
    """Where the host's journal listens."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as reader:
        reader.bind(str(tmp_path / "journal"))
        reader.settimeout(5)
        yield reader


def test_an_order_is_a_line_with_who_what_and_what_came_of_it(journal: Journal) -> None:
    journal.journal.note(order(outcome="failed", error="StartFailed", message="no\nroom"))

    (line,) = journal.lines()
    assert line.pop("at").endswith("+00:00")
    assert line == {
        "peer": "node2",
        "fingerprint": FINGERPRINT,
        "call": "instance.start",
        "target": "web",
        "outcome": "failed",
        "error": "StartFailed",
        "message": "no\\nroom",
    }
    assert journal.path.stat().st_mode & 0o777 == 0o600


def test_root_of_the_host_is_told_from_every_node(journal: Journal) -> None:
    journal.journal.note(order(peer=None, fingerprint=None))
    assert journal.lines()[0]["peer"] == "local"


@pytest.mark.parametrize("name", ["local", ""])
def test_no_peer_passes_for_root_of_the_host(
    name: str, journal: Journal, reader: socket.socket
) -> None:
    """The name of one that was refused is what it has called itself."""
    journal.journal.note(order(peer=name, outcome="refused"))
    assert journal.lines()[0]["peer"] == f"node {name}"
    assert f"\nKVMSEC_PEER=node {name}\n" in reader.recv(1 << 16).decode()


@pytest.mark.parametrize("text", ["a\nb", "a\r\x1b[2Jb", "\u2028", "\x00", '"},{"', "\udcff"])
def test_no_text_of_a_peers_breaks_a_line(
    text: str, journal: Journal, reader: socket.socket
) -> None:
    journal.journal.note(order(target=target_of(m.StopRequest(name=text)), message=text))

    assert len(journal.lines()) == 1
    assert journal.path.read_bytes().isascii()
    fields = reader.recv(1 << 16).decode().splitlines()
    assert [one.partition("=")[0] for one in fields] == [
        *("MESSAGE", "PRIORITY", "SYSLOG_IDENTIFIER"),
        *("KVMSEC_CALL", "KVMSEC_OUTCOME", "KVMSEC_PEER", "KVMSEC_TARGET"),
    ]


def test_the_hosts_journal_gets_the_same(journal: Journal, reader: socket.socket) -> None:
    journal.journal.note(order(outcome="refused"))

    told = reader.recv(1 << 16).decode()
    assert "KVMSEC_OUTCOME=refused\n" in told
    assert "PRIORITY=4\n" in told
    assert json.loads(told.splitlines()[0].removeprefix("MESSAGE=order ")) == journal.lines()[0]


def test_a_host_without_a_journal_has_syslog(tmp_path: Path, journal: Journal) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as reader:
        reader.bind(str(tmp_path / "log"))
        reader.settimeout(5)
        journal.journal.note(order())
        assert reader.recv(1 << 16).startswith(b"<30>kvmsec: order {")


def test_a_journal_that_nobody_reads_holds_nobody_up(
    journal: Journal, reader: socket.socket
) -> None:
    for _ in range(3000):
        journal.journal.note(order())
    assert len(journal.lines()) == 3000


def test_the_file_is_bounded(tmp_path: Path) -> None:
    journal = Journal(tmp_path, limit_bytes=2000)
    for number in range(100):
        journal.journal.note(order(target=f"vm-{number}"))

    former = tmp_path / "orders.jsonl.1"
    assert journal.lines()[-1]["target"] == "vm-99"
    assert journal.path.stat().st_size <= 2000
    assert former.stat().st_size <= 2000
    assert former.stat().st_mode & 0o777 == 0o600
    assert sorted(os.listdir(tmp_path)) == ["orders.jsonl", "orders.jsonl.1"]


def test_a_link_in_the_files_place_is_not_followed(tmp_path: Path, journal: Journal) -> None:
    (tmp_path / "victim").touch()
    journal.path.symlink_to("victim")
    journal.journal.note(order())

    assert (tmp_path / "victim").stat().st_size == 0
    (complaint,) = journal.complaints
    assert "instance.start" in complaint


def test_refusals_are_summed_up_once_there_are_too_many(journal: Journal) -> None:
    for _ in range(1000):
        journal.journal.note(order(outcome="refused"))
    assert len(journal.lines()) == 50

    journal.time = 1.0
    journal.journal.note(order(outcome="refused"))
    assert "950 more" in journal.lines()[-2]["message"]
    journal.journal.note(order(outcome="done"))
    assert journal.lines()[-1]["outcome"] == "done"


def test_what_was_done_is_never_left_out(journal: Journal) -> None:
    for _ in range(200):
        journal.journal.note(order(outcome="done"))
    assert len(journal.lines()) == 200


@pytest.mark.parametrize(
    ("request_", "target"),
    [
        (m.StartRequest(name="web", definition={"append": "password=secret"}), "web"),
        (m.UidRequest(uid=7), "uid 7"),
        (m.PoolRequest(uids="1-9"), "uids 1-9"),
        (m.FileRequest(name="server.key", content="secret"), "server.key"),
        (m.FileRequest(name="certless.pem", content=None), "certless.pem (removed)"),
        (m.CommitRequest(certificate="secret"), None),
        (m.State(revision=3, format=2, document={"x": "secret"}), "revision 3"),
        (m.JoinRequest(proof=FINGERPRINT, node_name="n", node_uuid=uuid4()), "n"),
        (m.Nothing(), None),
    ],
)
def test_a_target_is_a_name_and_no_secret(request_: m.Message, target: str | None) -> None:
    assert target_of(request_) == target
