"""Control groups that are no instance's any more, in the host's own hierarchies."""

import asyncio
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hypervisor.cgroup_mounts import mounted
from hypervisor.cgroups import InstanceCgroup
from kvmsec.linux import processes
from kvmsec.linux.children import Child
from kvmsec.linux.processes import ProcessId
from kvmsec.node import trial_groups
from kvmsec.node.doctor.kernel import check_cgroups
from kvmsec.node.doctor.subject import Subject
from kvmsec.node.host import Host
from kvmsec.node.reconcile import reconcile
from kvmsec.paths import Paths

pytestmark = pytest.mark.root


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    """A root of files of its own, whose groups have a parent that is gone afterwards."""
    parent = f"kvmsec-test-{secrets.token_hex(4)}"
    made = Host(Paths(tmp_path / "root"))
    made.prepare()
    made.paths.config.write_text(f'[cgroup]\nparent = "{parent}"\n')
    yield made
    for mount in mounted():
        for path, _, _ in os.walk(f"{mount.path}/{parent}", topdown=False):
            os.rmdir(path)


def make(host: Host, name: str) -> InstanceCgroup:
    group = host.hierarchy.create(host.paths.tag, name, host.config.cgroup.parent)
    assert group.paths
    return group


def there(host: Host) -> list[str]:
    """Whose groups are there."""
    return list(host.hierarchy.leaked(host.paths.tag, (), host.config.cgroup.parent))


def test_parents_without_a_group_go_where_one_was_killed_between_the_two(host: Host) -> None:
    group = make(host, "guest")
    parents = [Path(path).parent for path in group.paths]
    group.remove()
    for parent in parents:
        parent.mkdir(exist_ok=True)
    asyncio.run(reconcile(host))
    assert not any(parent.exists() for parent in parents)


def test_a_doctors_trial_group_is_left_while_it_is_at_work_and_removed_once_it_is_gone(
    host: Host, spawn: Callable[..., Child]
) -> None:
    def look_and_leave_the_group() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(InstanceCgroup, "remove", lambda group: None)
            next(iter(check_cgroups(Subject.of(host))))

    doctor = spawn(None, look_and_leave_the_group)
    (name,) = there(host)
    assert asyncio.run(reconcile(host)) == ()
    assert there(host) == [name]

    doctor.close()
    done = asyncio.run(reconcile(host))
    assert done
    assert all(line.endswith(f"/vm-{name}: removed") for line in done)
    assert there(host) == []
    assert not list(host.paths.locks.iterdir())


def test_a_later_process_with_a_doctors_pid_keeps_no_group_of_it(host: Host) -> None:
    me = processes.myself()
    make(host, trial_groups.name_for(ProcessId(me.pid, me.start_ticks - 1, me.boot_id)))
    make(host, f"Doctor-{me.pid}")  # No doctor's that could be told from others.
    asyncio.run(reconcile(host))
    assert there(host) == []


def test_a_group_that_cannot_be_removed_keeps_no_other(host: Host) -> None:
    for name in ("Foreign", "leaked"):
        make(host, name)
    told = asyncio.run(reconcile(host))
    (said,) = (line for line in told if not line.endswith("/vm-leaked: removed"))
    assert "/vm-Foreign: left as it is: 'Foreign' is not a name" in said
    assert there(host) == ["Foreign"]
