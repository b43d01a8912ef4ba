"""Hosts that give no session keyring: filters answer as they do, and a start is refused there."""

import errno
from collections.abc import Callable
from typing import Any

import pytest

from hypervisor.errors import JailFailed
from kvmsec.linux import credentials, keyrings, syscalls
from kvmsec.linux.children import run_in_child
from kvmsec.linux.credentials import Credentials
from kvmsec.linux.errors import ChildFailed
from tests.refused_calls import ADD_KEY, KEYCTL, REQUEST_KEY, answer
from tests.root.hypervisor.jailed import Build, binds_of, failure_of, held_by, said

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("the_launcher_is_as_before")]

SOMEBODY = Credentials(239901, 239902)
PERL = "/usr/bin/perl"
# keyctl(KEYCTL_GET_KEYRING_ID, KEY_SPEC_SESSION_KEYRING, 0)
ASK = (PERL, "-e", "print syscall(250, 0, -3, 0)")


def under(number: int, calls: tuple[int, ...], act: Callable[[], Any], *keep: int) -> Any:
    def filter_and_act() -> Any:
        answer(number, *calls)
        return act()

    return run_in_child(filter_and_act, what="acting", timeout_s=20, keep=keep)


@pytest.mark.parametrize("number", [errno.EPERM, errno.EACCES, errno.ENOSYS, 0])
def test_a_start_that_would_keep_its_launchers_session_keyring_is_refused(
    build: Build, number: int
) -> None:
    """0: a filter that says that all is well, and has done nothing."""
    jail = build()

    def start() -> list[Any]:
        failure = failure_of(jail, "/bin/true")
        return [failure.step, failure.errno, failure.hint]

    step, told, hint = under(number, (KEYCTL,), start, *held_by(jail))

    assert (step, told) == ("session keyring", number or errno.EPERM)
    assert 'confinement.may_be_missing = ["session-keyring"]' in hint
    assert "allow it keyctl" in hint


@pytest.mark.parametrize("number", [errno.EPERM, errno.EACCES, errno.ENOSYS, 0])
def test_where_it_may_be_missing_it_starts_all_the_same(build: Build, number: int) -> None:
    jail = build(may_share_keyring=True)
    told = under(number, (KEYCTL,), lambda: said(jail, "/bin/true")[0], *held_by(jail))
    assert told == 0


def test_where_it_may_be_missing_it_is_had_all_the_same(build: Build) -> None:
    jail = build(binds=binds_of(PERL), may_share_keyring=True)

    def start() -> list[int]:
        own = syscalls.keyctl(0, -3, 1)
        return [own, int(said(jail, *ASK)[1])]

    own, theirs = run_in_child(start, what="starting", timeout_s=20, keep=held_by(jail))
    assert theirs not in (own, -1)


def test_where_no_call_knows_of_keys_there_is_none_to_share(build: Build) -> None:
    """As in a kernel without CONFIG_KEYS."""
    jail = build()
    calls = (ADD_KEY, REQUEST_KEY, KEYCTL)
    start = lambda: said(jail, "/bin/true")[0]  # noqa: E731
    assert under(errno.ENOSYS, calls, start, *held_by(jail)) == 0
    assert under(errno.ENOSYS, calls, keyrings.are_known) is False


@pytest.mark.parametrize("calls", [(KEYCTL,), (KEYCTL, ADD_KEY), (KEYCTL, REQUEST_KEY), ()])
def test_keys_are_known_as_long_as_one_call_knows_of_them(calls: tuple[int, ...]) -> None:
    assert under(errno.ENOSYS, calls, keyrings.are_known) is True
    if calls:
        with pytest.raises(ChildFailed, match=r"\[Errno 38\]"):
            under(errno.ENOSYS, calls, credentials.leave_session_keyring)


def test_what_runs_kvmsecs_own_code_goes_on_without(build: Build) -> None:
    """A doctor on such a host still looks at all else."""
    assert under(errno.EPERM, (KEYCTL,), lambda: credentials.become(SOMEBODY)) is None


def test_the_hint_of_a_refusal_is_not_that_of_other_steps() -> None:
    assert "session-keyring" not in str(JailFailed("privileges", errno.EPERM, "no").hint)
