"""The look at a process before the guest runs: whatever one lock lacks is told, and stops it."""

import os
import signal
from collections.abc import Callable

import pytest
from attrs import evolve

from hypervisor import jail as jail_side
from hypervisor import process
from hypervisor.jail import NETWORK_NAMESPACE
from kvmsec.linux import credentials, namespaces, syscalls
from kvmsec.linux.credentials import Credentials
from tests.root.hypervisor.jailed import Build, execute, newborn

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("the_launcher_is_as_before")]

NO_FILTER = "seccomp mode 0, wanted 2"
NO_NEW_PRIVS = 38  # PR_SET_NO_NEW_PRIVS, linux/prctl.h
Patch = Callable[[pytest.MonkeyPatch], None]


def unverified(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(credentials, "verify", lambda _: None)


def keep_a_group(patch: pytest.MonkeyPatch) -> None:
    unverified(patch)
    set_groups = os.setgroups
    patch.setattr(os, "setgroups", lambda _: set_groups([239005]))


def keep_the_bounding_set(patch: pytest.MonkeyPatch) -> None:
    unverified(patch)
    patch.setattr(credentials, "_of_each_capability", lambda _: ())


def allow_new_privileges(patch: pytest.MonkeyPatch) -> None:
    unverified(patch)
    prctl = syscalls.prctl

    def skip(option: int, *arguments: int) -> int:
        return 0 if option == NO_NEW_PRIVS else prctl(option, *arguments)

    patch.setattr(syscalls, "prctl", skip)


def widen_the_umask(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(jail_side, "_problems_left", lambda _: ())
    umask = os.umask
    patch.setattr(os, "umask", lambda _: umask(0o022))


def keep_the_session(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(os, "setsid", lambda: None)


def pass_an_environment(patch: pytest.MonkeyPatch) -> None:
    more = {**jail_side.ENVIRONMENT, "TOKEN": "secret"}
    patch.setattr(jail_side, "ENVIRONMENT", more)
    said = tuple(f"{name}={value}".encode() for name, value in more.items())
    patch.setattr(jail_side, "_ENVIRONMENT_WORDS", said)


def leave_devices_writable(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(jail_side, "_seal", lambda *_: None)


@pytest.mark.parametrize(
    ("break_it", "told"),
    [
        (keep_a_group, "groups (239005,), wanted ()"),
        (keep_the_bounding_set, "capabilities (0, 0, 0, "),
        (allow_new_privileges, "no_new_privs False, wanted True"),
        (widen_the_umask, "umask 18, wanted 63"),
        (keep_the_session, "it is in a session of its launcher's"),
        (pass_an_environment, "its environment is not the one that it was to have"),
        (leave_devices_writable, "/dev can be written to in its tree"),
    ],
)
def test_what_one_step_left_out_is_told(
    build: Build, monkeypatch: pytest.MonkeyPatch, break_it: Patch, told: str
) -> None:
    jail = build()
    with monkeypatch.context() as patch:
        break_it(patch)
        with newborn(jail, "/bin/sleep", "60") as child:
            execute(child)
            patch.undo()
            found = process.confinement_problems(child)
    assert [one for one in found if one != NO_FILTER and not one.startswith(told)] == []
    assert len(found) == 2


def test_another_uid_and_gid_than_it_was_to_have_are_told(build: Build) -> None:
    with newborn(build(), "/bin/sleep", "60") as child:
        execute(child)
        child.jail = evolve(child.jail, credentials=Credentials(239003, 239004))
        uids, gids, filter_ = process.confinement_problems(child)
    assert uids.startswith("uids (239001,") and uids.endswith("(239003, 239003, 239003, 239003)")
    assert gids.startswith("gids (239002,") and gids.endswith("(239004, 239004, 239004, 239004)")
    assert filter_ == NO_FILTER


def test_a_network_that_was_to_be_its_own_is_told(build: Build) -> None:
    with newborn(build(without_locks=frozenset({NETWORK_NAMESPACE})), "/bin/sleep", "60") as child:
        execute(child)
        assert process.confinement_problems(child) == [NO_FILTER]
        child.jail = evolve(
            child.jail, cell=evolve(child.jail.cell, without_locks=frozenset[str]())
        )
        found = process.confinement_problems(child)
    assert found == [NO_FILTER, "it shares the node's net namespace"]


@pytest.mark.parametrize(
    ("kind", "flag"),
    [
        ("mnt", namespaces.CLONE_NEWNS),
        ("net", namespaces.CLONE_NEWNET),
        ("ipc", namespaces.CLONE_NEWIPC),
        ("uts", namespaces.CLONE_NEWUTS),
        ("pid", namespaces.CLONE_NEWPID),
        ("cgroup", namespaces.CLONE_NEWCGROUP),
    ],
)
def test_each_kind_of_namespace_that_is_shared_is_told(kind: str, flag: int) -> None:
    every = (
        *(namespaces.CLONE_NEWNS, namespaces.CLONE_NEWNET, namespaces.CLONE_NEWIPC),
        *(namespaces.CLONE_NEWUTS, namespaces.CLONE_NEWPID, namespaces.CLONE_NEWCGROUP),
    )
    pid, pidfd = syscalls.clone3(sum(every) - flag)
    if pid == 0:
        signal.pause()
        os._exit(0)
    try:
        assert process._shared_namespaces(pid) == [f"it shares the node's {kind} namespace"]
    finally:
        process.kill_and_wait(pidfd, 10)
        process.reap(pidfd)
        os.close(pidfd)
