"""Invitations that are not spent: each is used once, by one."""

import os
import stat
from datetime import timedelta
from pathlib import Path

import pytest

from kvmsec.pki import invitations
from kvmsec.pki.errors import KeyFileRefused, NoInvitation
from kvmsec.pki.invitations import Invitations
from kvmsec.pki.joining import Invitation, invite
from kvmsec.pki.private_files import write_private
from tests.unit.kvmsec.pki.authorities import NOW
from tests.unit.kvmsec.pki.killing import killed_everywhere

ANCHOR = "a" * 64
LATER = NOW + timedelta(hours=2)


@pytest.fixture
def store(tmp_path: Path) -> Invitations:
    return Invitations(tmp_path / "invitations.json")


def _invite(name: str = "node2") -> Invitation:
    return invite(name, ANCHOR, now=NOW)


def test_an_invitation_is_found_by_its_node(store: Invitations, tmp_path: Path) -> None:
    one, two = _invite("node2"), _invite("node3")
    store.add(two, NOW)
    store.add(one, NOW)

    assert store.find("node2", NOW) == one
    assert store.current(NOW) == (one, two)
    assert stat.S_IMODE((tmp_path / "invitations.json").stat().st_mode) == 0o600


def test_there_is_none_unless_it_was_made(store: Invitations) -> None:
    assert store.current(NOW) == ()
    with pytest.raises(NoInvitation) as caught:
        store.find("node2", NOW)
    assert "node invite node2" in str(caught.value.hint)


def test_an_invitation_is_spent_once(store: Invitations) -> None:
    invitation = _invite()
    store.add(invitation, NOW)
    store.spend(invitation, NOW)
    for again in (lambda: store.spend(invitation, NOW), lambda: store.find("node2", NOW)):
        with pytest.raises(NoInvitation):
            again()


def test_a_newer_invitation_takes_the_place_of_the_older(store: Invitations) -> None:
    older, newer = _invite(), _invite()
    store.add(older, NOW)
    store.add(newer, NOW)
    with pytest.raises(NoInvitation, match="newer"):
        store.spend(older, NOW)
    store.spend(newer, NOW)


def test_an_invitation_that_is_over_is_not_used(store: Invitations) -> None:
    invitation = _invite()
    store.add(invitation, NOW)
    assert store.current(LATER) == ()
    for late in (lambda: store.find("node2", LATER), lambda: store.spend(invitation, LATER)):
        with pytest.raises(NoInvitation):
            late()


def test_what_is_over_is_forgotten_and_the_rest_stays(store: Invitations) -> None:
    lasting = invite("node3", ANCHOR, now=NOW, lifetime=timedelta(hours=5))
    store.add(_invite(), NOW)
    store.add(lasting, NOW)

    assert len(store.current(NOW)) == 2
    store.add(invite("node4", ANCHOR, now=LATER, lifetime=timedelta(hours=5)), LATER)
    assert [one.node_name for one in store.current(NOW)] == ["node3", "node4"]


def test_of_two_rivals_one_gets_it(store: Invitations, tmp_path: Path) -> None:
    invitation = _invite()
    store.add(invitation, NOW)
    ready, go = os.pipe()
    rivals = []
    for _ in range(8):
        pid = os.fork()
        if pid == 0:
            status = 2
            try:
                os.close(go)
                os.read(ready, 1)
                Invitations(tmp_path / "invitations.json").spend(invitation, NOW)
                status = 0
            except NoInvitation:
                status = 1
            finally:
                os._exit(status)
        rivals.append(pid)
    os.close(ready)
    os.close(go)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in rivals]
    assert sorted(statuses) == [0, *[1] * 7]


def test_a_rival_waits_until_the_first_has_written(
    store: Invitations, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    invitation = _invite()
    store.add(invitation, NOW)
    go_read, go = os.pipe()
    writing, writing_write = os.pipe()

    def write_later(path: Path, text: str) -> None:
        os.write(writing_write, b"w")
        os.read(go_read, 1)
        write_private(path, text)

    with monkeypatch.context() as slow:
        slow.setattr(invitations, "write_private", write_later)
        first = _spend_in_child(store, invitation)
    os.read(writing, 1)
    second = _spend_in_child(store, invitation)
    # It either waits for the lock now, or has decided already on what is about to change.
    lock = (tmp_path / "invitations.lock").stat().st_ino
    while not _is_waited_for(lock) and os.waitid(os.P_PID, second, FINISHED) is None:
        pass
    os.write(go, b"g")
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in (first, second)]
    for descriptor in (go_read, go, writing, writing_write):
        os.close(descriptor)
    assert statuses == [0, 1]


FINISHED = os.WEXITED | os.WNOHANG | os.WNOWAIT


def _spend_in_child(store: Invitations, invitation: Invitation) -> int:
    pid = os.fork()
    if pid == 0:
        status = 2
        try:
            store.spend(invitation, NOW)
            status = 0
        except NoInvitation:
            status = 1
        finally:
            os._exit(status)
    return pid


def _is_waited_for(inode: int) -> bool:
    """proc_locks(5): an arrow marks one that waits."""
    lines = Path("/proc/locks").read_text().splitlines()
    return any("->" in line and f":{inode} " in line for line in lines)


def test_a_spending_that_is_killed_anywhere_spends_it_or_not(
    store: Invitations, tmp_path: Path
) -> None:
    invitation = _invite()

    def reset() -> None:
        store.add(invitation, NOW)

    for _ in killed_everywhere(lambda: store.spend(invitation, NOW), reset):
        assert store.current(NOW) in ((), (invitation,))


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"format": 1}',
        '{"format": 1, "invitations": [{}]}',
        '{"format": 1, "invitations": {"a": 1}}',
        '{"format": 2, "invitations": []}',
        "[" * 100_000,
    ],
)
def test_a_file_that_is_not_whole_invites_nobody(
    content: str, store: Invitations, tmp_path: Path
) -> None:
    path = tmp_path / "invitations.json"
    path.write_text(content)
    path.chmod(0o600)
    for use in (lambda: store.find("node2", NOW), lambda: store.add(_invite(), NOW)):
        with pytest.raises(KeyFileRefused) as caught:
            use()
        assert str(path) in caught.value.message
    assert path.read_text() == content


def test_a_file_that_others_could_read_invites_nobody(store: Invitations, tmp_path: Path) -> None:
    store.add(_invite(), NOW)
    (tmp_path / "invitations.json").chmod(0o644)
    with pytest.raises(KeyFileRefused, match="0644"):
        store.find("node2", NOW)
