"""Each judgement by itself: a sealed process with one thing changed, and what that adds."""

from collections.abc import Mapping
from typing import Any

import pytest
from attrs import evolve

from kvmsec.audit import facts as f
from kvmsec.audit.examination import report_on
from kvmsec.audit.points import CONFINEMENT, ON_TOP, POINTS, judge
from kvmsec.audit.score import Finding

FULL = (1 << 41) - 1
DENIED = dict.fromkeys(("obsolete", "elevateprivileges", "spawn", "resourcecontrol"), "deny")
WHO = f.Credentials(
    uids=(30000,),
    gids=(30000,),
    groups=(),
    capabilities=(0, 0, 0, 0, 0),
    no_new_privs=True,
    seccomp=2,
    seccomp_filters=2,
    umask=0o077,
    user="kvmsec-30000",
)
ALONE = f.Sharers(0, 0)
SPACES = f.Namespaces(("user", "time"), ("mnt", "net", "pid", "ipc", "uts", "cgroup"), ("lo",))
HELD = f.Descriptors(has_kvm_machine=True)
TREE = f.Tree(kind="own", sized=("/output",))
GROUP = f.ControlGroup(paths=("/kvmsec/web",), memory_bytes=1 << 30, pids=64, cpus=2.0)
BOUND = f.Limit(64, 64)
LIMITS = {
    **dict.fromkeys(("open files", "processes", "locked memory", "file size"), BOUND),
    **{"msgqueue size": f.Limit(0, 0), "core file size": f.Limit(1, 1)},
}
COVERED = f.Coverage(ipv4=True, ipv6=True, rules=("nft table inet kvmsec",))
SEALED = f.Facts(
    pid=7,
    start_ticks=1,
    comm="qemu-system-x86",
    executable="/usr/bin/qemu-system-x86_64",
    credentials=WHO,
    sharers=ALONE,
    namespaces=SPACES,
    descriptors=HELD,
    sockets=f.Sockets(),
    tree=TREE,
    control_group=GROUP,
    limits=LIMITS,
    core_goes_to="program",
    is_dumpable=True,
    oom_score_adj=0,
    arguments=f.Arguments(sandbox=DENIED),
    secret_variables=(),
    coverage=COVERED,
)


def found(facts: f.Facts) -> dict[str, Finding]:
    return {finding.code: finding for finding in judge(facts)}


def exposed(facts: f.Facts) -> dict[str, float]:
    return {code: one.exposure for code, one in found(facts).items() if one.exposure}


def test_a_sealed_process_scores_nothing() -> None:
    report = report_on(SEALED)
    assert exposed(SEALED) == {}
    assert (report.score, report.rating) == (0.0, "PERFECT")
    assert all(one.hint is None for one in report.findings if one.state == "sealed")


def test_the_points_of_confinement_weigh_ten_together() -> None:
    assert sum(point.weight for point in CONFINEMENT) == pytest.approx(10.0)


def test_codes_are_unique_and_every_point_says_why_and_what_to_do() -> None:
    assert len({point.code for point in POINTS}) == len(POINTS)
    assert all(point.why and point.hint and point.code == point.code.lower() for point in POINTS)


def who(**changes: Any) -> dict[str, Any]:
    return {"credentials": evolve(WHO, **changes)}


def covered(interfaces: tuple[str, ...] | None = ("lo",), **changes: Any) -> dict[str, Any]:
    return {
        "coverage": evolve(COVERED, **changes),
        "namespaces": evolve(SPACES, interfaces=interfaces),
    }


def tree(**changes: Any) -> dict[str, Any]:
    return {"tree": evolve(TREE, **changes)}


def group(**changes: Any) -> dict[str, Any]:
    return {"control_group": evolve(GROUP, **changes)}


def limit(**changes: Any) -> dict[str, Any]:
    renamed = {name.replace("_", " "): value for name, value in changes.items()}
    return {"limits": {**LIMITS, **renamed}}


def listening(path: str, is_open: bool | None) -> dict[str, Any]:
    one = f.UnixListener(path=path, mode=0o666, is_open=is_open)
    return {"sockets": f.Sockets(unix_listeners=(one,))}


def holding(mode: int, **changes: Any) -> dict[str, Any]:
    file = f.File(path="/srv/disk", mode=mode, uid=0, **{"is_written": True, **changes})
    return {"descriptors": evolve(HELD, files=(file,))}


CASES: list[tuple[Mapping[str, Any], dict[str, float]]] = [
    # Who it is.
    (
        who(uids=(0,), gids=(0,)),
        {"uid": 1.0, "uid-shared": 0.7, "groups": 0.3, "namespace-user": 0.1},
    ),
    (who(uids=(0, 30000)), {"uid": 1.0, "uid-shared": 0.7, "namespace-user": 0.1}),
    (who(uids=(30000, 30001)), {"uid": 0.5}),
    (who(has_login_shell=True), {"uid": 0.4}),
    ({"sharers": f.Sharers(3, 2)}, {"uid-shared": 0.7, "dumpable": 0.1}),
    ({"sharers": f.Sharers(1, 0)}, {"uid-shared": 0.56, "dumpable": 0.1}),
    ({"sharers": f.Sharers(1, 1), "is_dumpable": False}, {"uid-shared": 0.7}),
    (who(user="libvirt-qemu"), {"uid-shared": 0.35}),
    (who(groups=(6,), group_names=("disk",)), {"groups": 0.3}),
    (who(groups=(104,), group_names=("kvm",)), {"groups": 0.09}),
    (who(groups=(900,), group_names=("render",)), {"groups": 0.18}),
    (who(groups=(0,), group_names=("root",)), {"groups": 0.3}),
    (who(gids=(6,), own_group_names=("disk",)), {"groups": 0.3}),
    (who(gids=(104,), own_group_names=("kvm",)), {"groups": 0.09}),
    (who(gids=(100,), own_group_names=("users",)), {}),
    (who(gids=(104,), own_group_names=("kvm",), groups=(104, 6), group_names=("kvm", "render")),
     {"groups": 0.18}),
    # What it is allowed.
    (who(capabilities=(0, 0, 1 << 21, 0, 0)), {"capabilities": 1.0, "namespace-user": 0.1}),
    (who(capabilities=(0, 0, 0, 0, 1 << 12)), {"capabilities": 1.0, "namespace-user": 0.1}),
    (who(capabilities=(0, 1 << 23, 0, 0, 0)), {"capabilities": 0.3, "namespace-user": 0.1}),
    (who(capabilities=(0, 0, 0, FULL, 0)), {"bounding-set": 0.1}),
    (who(capabilities=(0, 0, 0, FULL, 0), no_new_privs=False),
     {"bounding-set": 0.2, "no-new-privs": 0.4}),
    (who(umask=0), {"umask": 0.1}),
    (who(umask=0o022), {"umask": 0.05}),
    (who(seccomp=0, seccomp_filters=0), {"seccomp": 1.2, "sandbox": 0.3}),
    (who(seccomp_filters=1), {"seccomp": 0.24}),
    (who(seccomp_filters=None), {"seccomp": 0.36}),
    ({"arguments": f.Arguments(sandbox=None)}, {"sandbox": 0.3}),
    ({"arguments": f.Arguments(sandbox={**DENIED, "spawn": ""})}, {"sandbox": 0.15}),
    ({"arguments": f.Arguments(sandbox={**DENIED, "obsolete": ""})}, {}),
    (who(tracer_pid=99), {"tracer": 0.2}),
    # Namespaces.
    ({"namespaces": evolve(SPACES, own=SPACES.own[1:], shared=("mnt", "user"))},
     {"namespace-mnt": 0.2}),
    ({"namespaces": evolve(SPACES, own=("mnt",), shared=("net", "pid", "ipc", "uts", "cgroup"))},
     {"namespace-net": 0.4, "namespace-pid": 0.3, "namespace-ipc": 0.2, "namespace-uts": 0.1,
      "namespace-cgroup": 0.1}),
    # Files and devices.
    (tree(kind="host"), {"root-tree": 0.6, "writable-paths": 0.3}),
    (tree(kind="host", writable=("/tmp",)), {"root-tree": 0.6, "writable-paths": 0.42}),
    (tree(kind="host", writable=("/", "/tmp")), {"root-tree": 0.6, "writable-paths": 0.6}),
    (tree(kind="chroot"), {"root-tree": 0.3, "writable-paths": 0.3, "devices": 0.3}),
    (tree(kernel=("/proc",)), {"root-tree": 0.18}),
    (tree(writable=("/data",)), {"writable-paths": 0.42}),
    (tree(is_cut=True), {"writable-paths": 0.3, "devices": 0.3}),
    (tree(devices=("/dev/vda",)), {"devices": 0.6}),
    (tree(devices=("/dev/net/tun",)), {"devices": 0.24}),
    ({"descriptors": evolve(HELD, devices=("/dev/mem",))}, {"devices": 0.6}),
    ({**tree(set_uid=("/usr/bin/su",)), **who(no_new_privs=False)},
     {"set-uid-programs": 0.2, "no-new-privs": 0.4}),
    (tree(set_uid=("/usr/bin/su",)), {}),
    # The network.
    (covered(ipv4=False, ipv6=False), {"packet-rules": 0.24}),
    (covered(ipv4=False, ipv6=False, interfaces=None), {"packet-rules": 0.8}),
    (covered(ipv6=False, interfaces=None), {"packet-rules": 0.48}),
    (covered(ipv4=False, interfaces=("lo", "eth0")), {"packet-rules": 0.48}),
    (covered(ipv4=False, ipv6=False, interfaces=("lo", "eth0")), {"packet-rules": 0.8}),
    ({"canary": f.Canary(refused=("a", "b"), sent=())}, {}),
    ({"canary": f.Canary(refused=("a",), sent=("b",))}, {"packet-rules": 0.24}),
    ({"canary": f.Canary(refused=(), sent=("b",)), **covered(interfaces=None)},
     {"packet-rules": 0.8}),
    ({"canary": f.Canary(refused=(), sent=())}, {"packet-rules": 0.8}),
    ({"unread": {"canary": "no room"}}, {"packet-rules": 0.8}),
    ({"sockets": f.Sockets(of_host=("tcp 0.0.0.0:1",))}, {"inet-sockets": 0.3}),
    ({"sockets": f.Sockets(unplaced=1)}, {"inet-sockets": 0.15}),
    ({"sockets": f.Sockets(tcp_listeners=("tcp 127.0.0.1:5900", "tcp [::1]:5900"))},
     {"tcp-listeners": 0.6}),
    ({"sockets": f.Sockets(tcp_listeners=("tcp 127.0.0.1:1", "tcp 0.0.0.0:5900"))},
     {"tcp-listeners": 1.0}),
    (listening("/tmp/qmp", True), {"unix-listeners": 0.7}),
    (listening("/run/qmp", None), {"unix-listeners": 0.7}),
    (listening("/run/qmp", False), {}),
    (holding(0o666), {"disk-paths": 0.5}),
    (holding(0o644), {"disk-paths": 0.25}),
    (holding(0o600), {}),
    (holding(0o666, is_reachable=False), {}),
    (holding(0o666, is_written=False), {}),
    # What it may use up.
    (group(memory_bytes=None), {"cgroup-memory": 0.2}),
    (group(pids=None), {"cgroup-pids": 0.1}),
    (group(cpus=None), {"cgroup-cpu": 0.05}),
    (group(cpus=None, has_cpu_share=True), {}),
    (group(cpus=None, others=2), {"cgroup-cpu": 0.08}),
    ({"control_group": f.ControlGroup(paths=())},
     {"cgroup-memory": 0.2, "cgroup-pids": 0.1, "cgroup-cpu": 0.1}),
    (limit(processes=f.Limit(None, None)), {"rlimits": 0.02}),
    (limit(open_files=f.Limit(64, 1 << 20)), {"rlimits": 0.02}),
    (limit(core_file_size=f.Limit(None, None)), {"core-dumps": 0.05}),
    (limit(core_file_size=f.Limit(0, None)), {"core-dumps": 0.05}),  # piped to a program
    ({**limit(core_file_size=f.Limit(0, None)), "core_goes_to": "file"}, {"core-dumps": 0.03}),
    ({**limit(core_file_size=f.Limit(0, 0)), "core_goes_to": "file"}, {}),
    ({**limit(core_file_size=f.Limit(1, 1)), "core_goes_to": "socket"}, {"core-dumps": 0.05}),
    ({**limit(core_file_size=f.Limit(1, 1)), "core_goes_to": None}, {"core-dumps": 0.05}),
    ({"oom_score_adj": -1000}, {"oom-score": 0.05}),
    # The program and its words.
    ({"descriptors": evolve(HELD, has_kvm_machine=False)}, {"accelerator": 0.5}),
    ({"is_executable_deleted": True}, {"executable": 0.3}),
    ({"arguments": f.Arguments(sandbox=DENIED, secrets=("-object (data)",))}, {"secrets": 0.5}),
    ({"secret_variables": ("TOKEN",)}, {"environment": 0.1}),
    ({"has_terminal": True}, {"terminal": 0.1}),
    # What is shown alone.
    ({"label": "libvirt-1"}, {}),
    ({"instance": "web", "tolerated": ("cgroup",)}, {}),
]  # fmt: skip


@pytest.mark.parametrize(("change", "expected"), CASES)
def test_what_a_change_adds(change: Mapping[str, Any], expected: dict[str, float]) -> None:
    changed = evolve(SEALED, **change)

    assert exposed(changed) == expected
    assert report_on(changed).score == pytest.approx(sum(expected.values()))


def test_every_point_with_a_weight_can_be_exposed() -> None:
    by_table = {code for _, expected in CASES for code in expected}

    assert by_table == {point.code for point in POINTS if point.weight}


UNREADABLE = {
    "credentials": None,
    "sharers": None,
    "namespaces": None,
    "descriptors": None,
    "sockets": None,
    "tree": None,
    "control_group": None,
    "limits": None,
    "is_dumpable": None,
    "oom_score_adj": None,
    "arguments": None,
    "secret_variables": None,
    "coverage": None,
    "executable": None,
}


@pytest.mark.parametrize("part", UNREADABLE)
def test_what_could_not_be_read_is_never_sealed(part: str) -> None:
    changed = evolve(SEALED, **{part: None}, unread={part: "Permission denied"})
    before, after = found(SEALED), found(changed)

    worse = [code for code in before if after[code] != before[code]]
    assert worse
    assert all(after[code].state == "unknown" for code in worse)
    assert all(after[code].exposure == after[code].weight for code in worse)


def test_nothing_read_is_the_worst_there_is() -> None:
    nothing = evolve(SEALED, **UNREADABLE)

    told = found(nothing)
    assert {one.state for one in told.values()} <= {"unknown", "sealed", "note"}
    assert {code for code, one in told.items() if one.state == "sealed"} == {"terminal"}
    assert report_on(nothing).score == 10.0


def test_what_comes_on_top_never_passes_ten() -> None:
    everything = evolve(
        SEALED,
        **UNREADABLE,
        has_terminal=True,
    )
    assert report_on(everything).score == 10.0
    assert sum(point.weight for point in ON_TOP) > 0


def test_a_disk_of_two_descriptors_is_named_once() -> None:
    file = f.File(path="/srv/disk", mode=0o644, uid=0, is_written=True)
    facts = evolve(SEALED, descriptors=evolve(HELD, files=(file, file)))

    (found,) = (one for one in judge(facts) if one.code == "disk-paths")

    assert found.message == "every user of the host may read /srv/disk"


def test_an_instance_has_its_own_name_and_others_the_one_they_claim() -> None:
    claimed = evolve(SEALED, arguments=f.Arguments(sandbox=DENIED, name="shop"))
    assert claimed.name == "shop"
    assert evolve(claimed, instance="web").name == "web"
    assert SEALED.name == "qemu-system-x86"
