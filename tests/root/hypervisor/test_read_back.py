"""The child's own look at itself before the exec: what a step left undone is told, and stops it."""

import fcntl
import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
from attrs import evolve

from hypervisor import jail as jails
from hypervisor.jail import Jail
from hypervisor.steps import Step
from kvmsec.linux import credentials, inherited, syscalls
from kvmsec.linux.credentials import Credentials
from tests.root.hypervisor.jailed import Build, failure_of, said

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("the_launcher_is_as_before")]

DUMPABLE, DEATH_SIGNAL = 4, 1  # PR_SET_DUMPABLE, PR_SET_PDEATHSIG, linux/prctl.h
Patch = Callable[[pytest.MonkeyPatch], None]


def before(name: str, act: Callable[[Jail], Any]) -> Patch:
    """Have the child do something else right before one of its steps."""

    def patch_steps(patch: pytest.MonkeyPatch) -> None:
        number = [step.name for step in jails.JAIL_STEPS].index(name)
        steps = list(jails.JAIL_STEPS)
        steps.insert(number, Step("fault", act, "for the test"))
        patch.setattr(jails, "JAIL_STEPS", tuple(steps))

    return patch_steps


def without(option: int, wanted: int) -> Patch:
    """The kernel is not asked by one prctl(2) with this argument, and nobody is told."""

    def patch_call(patch: pytest.MonkeyPatch) -> None:
        prctl = syscalls.prctl

        def skip(asked: int, argument: int = 0) -> int:
            return 0 if (asked, argument) == (option, wanted) else prctl(asked, argument)

        patch.setattr(syscalls, "prctl", skip)

    return patch_call


def keep_the_umask(patch: pytest.MonkeyPatch) -> None:
    step = Step("umask", lambda _: None, "for the test")
    steps = tuple(step if one.name == "umask" else one for one in jails.JAIL_STEPS)
    patch.setattr(jails, "JAIL_STEPS", steps)


def stay_traceable(patch: pytest.MonkeyPatch) -> None:
    """As on a node with fs.suid_dumpable 1: the change of ids does not see to it either."""
    without(DUMPABLE, 0)(patch)
    change = os.setresuid

    def change_and_stay(*uids: int) -> None:
        change(*uids)
        syscalls.prctl(DUMPABLE, 1)

    patch.setattr(os, "setresuid", change_and_stay)


def ask_no_more_once_ids_changed(patch: pytest.MonkeyPatch) -> None:
    """To become somebody makes the kernel forget the signal."""
    take = credentials.take

    def take_and_forget(wanted: Credentials) -> None:
        take(wanted)
        without(DEATH_SIGNAL, signal.SIGKILL)(patch)

    patch.setattr(credentials, "take", take_and_forget)


def leave_open(flags: int, lowest: int) -> Callable[[Jail], None]:
    def leave(_: Jail) -> None:
        opened = os.open("/", flags)
        os.set_inheritable(fcntl.fcntl(opened, fcntl.F_DUPFD, lowest), True)
        os.close(opened)

    return leave


def use_a_number_twice(patch: pytest.MonkeyPatch) -> None:
    place = os.dup2

    def misplace(ours: int, inside: int, inheritable: bool = True) -> int:
        return place(ours if inside else 1, inside, inheritable)

    patch.setattr(os, "dup2", misplace)


def pass_an_environment(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(jails, "ENVIRONMENT", {**jails.ENVIRONMENT, "TOKEN": "secret"})


@pytest.mark.parametrize(
    ("break_it", "step", "told"),
    [
        (keep_the_umask, "read back", "umask 0o000, wanted 0o077"),
        (before("privileges", lambda _: os.umask(0o022)), "read back", "umask 0o022, wanted 0o077"),
        (
            before("system calls", leave_open(os.O_RDONLY, 700)),
            "read back",
            "descriptors [700] stay open and nobody granted them",
        ),
        (
            before("privileges", leave_open(os.O_PATH, 25)),
            "read back",
            "descriptors [25] stay open and nobody granted them",
        ),
        (
            before("privileges", lambda _: os.set_inheritable(2, False)),
            "read back",
            "descriptors [2] are granted and do not stay open",
        ),
        (
            before("privileges", lambda _: os.close(1)),
            "read back",
            "descriptors [1] are granted and do not stay open",
        ),
        (use_a_number_twice, "descriptors", "descriptor 0 is of another file than was granted"),
        (stay_traceable, "privileges", "it can be traced and leave a core (dumpable 1)"),
        (
            ask_no_more_once_ids_changed,
            "launcher's end",
            "the signal at its launcher's end is 0, wanted 9",
        ),
        (
            without(DEATH_SIGNAL, 0),
            "launcher's end",
            "the signal at its launcher's end is 9, wanted 0",
        ),
        (pass_an_environment, "exec", "the environment is not the one that QEMU is to have"),
    ],
)
def test_what_is_wrong_before_the_exec_is_told(
    build: Build, monkeypatch: pytest.MonkeyPatch, break_it: Patch, step: str, told: str
) -> None:
    jail = build()
    with monkeypatch.context() as patch:
        break_it(patch)
        error = failure_of(jail, "/bin/sleep", "60")
    assert error.step == step
    assert error.detail.endswith(told)


def test_several_things_that_are_wrong_are_told_at_once(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(jail: Jail) -> None:
        os.umask(0o002)
        leave_open(os.O_RDONLY, 40)(jail)

    before("system calls", spoil)(monkeypatch)
    error = failure_of(build(), "/bin/true")
    assert error.detail.endswith(
        "umask 0o002, wanted 0o077; descriptors [40] stay open and nobody granted them"
    )


def test_what_is_granted_stays_open_and_nothing_else_is_told(build: Build) -> None:
    jail = build()
    granted = dict.fromkeys((5, 9, 63, 200, 1000), jail.log)
    assert said(evolve(jail, descriptors=granted), "/bin/true")[0] == 0


def test_survivors_are_those_that_are_open_and_not_closed_by_an_exec() -> None:
    here = os.open("/", os.O_RDONLY)
    try:
        there = fcntl.fcntl(here, fcntl.F_DUPFD_CLOEXEC, 512)
        try:
            assert not {here, there} & inherited.survivors(1024)
            os.set_inheritable(there, True)
            assert there in inherited.survivors(there + 1)
            assert there not in inherited.survivors(there)
        finally:
            os.close(there)
    finally:
        os.close(here)
    with pytest.raises(OSError, match="poll"):
        inherited.survivors(1 << 22)
