"""The front's user: of its own, without a privilege, and an error that says how to make it."""

from collections.abc import Iterator

import pytest

from kvmsec.daemon.front_user import UnfitFrontUser, find_front_user
from kvmsec.linux import command
from uidpool.ranges import EMPTY, UidRanges

pytestmark = pytest.mark.root

USER = "kvmsec-trial"


def run(*argv: str) -> None:
    command.run(argv, timeout_s=30)


@pytest.fixture
def user() -> Iterator[str]:
    """Made by the very command that the error prints."""
    with pytest.raises(UnfitFrontUser) as raised:
        find_front_user(USER, EMPTY)
    assert raised.value.hint is not None
    run(*raised.value.hint.removeprefix("make it: ").split())
    yield USER
    run("userdel", USER)


def test_the_user_that_the_error_tells_to_make_is_fit(user: str) -> None:
    found = find_front_user(user, EMPTY)
    assert found.uid > 0
    assert found.gid > 0


def test_a_uid_of_the_pool_is_refused(user: str) -> None:
    uid = find_front_user(user, EMPTY).uid
    with pytest.raises(UnfitFrontUser, match="pool"):
        find_front_user(user, UidRanges.of((uid, uid)))


@pytest.mark.parametrize(
    ("change", "back"),
    [
        (("usermod", "--append", "--groups", "sudo", USER), ("gpasswd", "-d", USER, "sudo")),
        (("usermod", "--shell", "/bin/sh", USER), ("usermod", "--shell", "/bin/false", USER)),
        (("usermod", "--append", "--groups", USER, "daemon"), ("gpasswd", "-d", "daemon", USER)),
        (("usermod", "--gid", "disk", USER), ("usermod", "--gid", USER, USER)),
    ],
    ids=["a group", "a shell", "others in its group", "a group of the system's"],
)
def test_a_user_that_could_do_more_is_refused(
    user: str, change: tuple[str, ...], back: tuple[str, ...]
) -> None:
    run(*change)
    with pytest.raises(UnfitFrontUser) as raised:
        find_front_user(user, EMPTY)
    assert raised.value.hint
    run(*back)
    find_front_user(user, EMPTY)


def test_root_is_refused() -> None:
    with pytest.raises(UnfitFrontUser, match="root"):
        find_front_user("root", EMPTY)
