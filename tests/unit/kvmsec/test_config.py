"""kvmsec.toml: every fault at once, nothing ignored, nobody's but root's."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest

from hypervisor.machine import MAX_QUOTA, MAX_WEIGHT
from kvmsec import config as config_module
from kvmsec.config import Config, load_config, parse_config, show_config
from kvmsec.errors import BadConfig
from kvmsec.linux.credentials import NOBODY, Credentials, acting_as
from kvmsec.model.security import SecurityModel
from uidpool.ranges import UidRanges

SOURCE = Path("/etc/kvmsec/kvmsec.toml")

WHOLE = """
[firewall]
backend = "iptables"
log_prefix = "site: "
log_group = 7
[uids]
reuse_delay_s = 0
freed_ranges = "60000-60500, 61184-65519"
[qemu]
path = "/opt/qemu/bin/qemu-system-x86_64"
extra_arguments = ["-no-reboot"]
ready_timeout_s = 5
[limits]
log_kib = 64
max_memory_mib = 4096
max_vcpus = 8
memory_margin_mib = 0
cpu_weight = 10
max_cpu_weight = 20
cpu_quota_percent = 30
max_cpu_quota_percent = 40
io_weight = 50
max_io_weight = 60
oom_score_adjust = -70
min_oom_score_adjust = -80
[cgroup]
parent = "/machine.slice/kvmsec/"
[confinement]
may_be_missing = ["cgroup-memory", "seccomp"]
[security]
weakest_model = "pool"
[node]
bind = ["192.0.2.1", "[2001:DB8::1]:99"]
front_user = "kvmsec-net"
[remote]
disk_folders = ["/srv/disks"]
kernel_folders = ["/srv/boot"]
firmware_folders = ["/usr/share/OVMF"]
qemu_programs = ["/usr/bin/qemu-system-x86_64"]
bridges = ["br0"]
taps = ["tap7"]
[cluster]
copy_valid_s = 600
"""


@pytest.fixture
def place() -> Iterator[Path]:
    """A file in a directory that is root's all the way up, which pytest's own are not."""
    directory = Path("/run/kvmsec-test-config")
    directory.mkdir(mode=0o755)
    yield directory / "kvmsec.toml"
    for file in directory.iterdir():
        file.unlink()
    directory.rmdir()


def faults(document: dict[str, object]) -> tuple[str, ...]:
    with pytest.raises(BadConfig) as caught:
        parse_config(document, SOURCE)
    assert caught.value.path == SOURCE
    assert str(SOURCE) in caught.value.message
    return caught.value.problems


def test_nothing_said_gives_the_documented_defaults() -> None:
    config = parse_config({}, SOURCE)

    assert config == Config()
    assert config.firewall.backend == "auto"
    assert config.uids.reuse_delay_s == 60
    assert config.qemu.ready_timeout_s == 30
    assert config.security.weakest_model is SecurityModel.NONE
    assert config.confinement.may_be_missing == ()


@pytest.mark.root
def test_every_setting_is_read(place: Path) -> None:
    place.write_text(WHOLE)
    config = load_config(place)

    assert config.firewall.backend == "iptables"
    assert (config.firewall.log_prefix, config.firewall.log_group) == ("site: ", 7)
    assert config.uids.reuse_delay_s == 0
    assert config.uids.freed_ranges == UidRanges.parse("60000-60500,61184-65519")
    assert config.qemu.path == Path("/opt/qemu/bin/qemu-system-x86_64")
    assert config.qemu.extra_arguments == ("-no-reboot",)
    assert config.qemu.ready_timeout_s == 5.0
    assert (config.limits.log_kib, config.limits.max_memory_mib) == (64, 4096)
    assert config.limits.max_vcpus == 8
    limits = config.limits
    assert (limits.memory_margin_mib, limits.cpu_weight, limits.max_cpu_weight) == (0, 10, 20)
    assert (limits.cpu_quota_percent, limits.max_cpu_quota_percent) == (30, 40)
    assert (limits.io_weight, limits.max_io_weight) == (50, 60)
    assert (limits.oom_score_adjust, limits.min_oom_score_adjust) == (-70, -80)
    assert config.cgroup.parent == "machine.slice/kvmsec"
    assert config.confinement.may_be_missing == ("cgroup-memory", "seccomp")
    assert config.security.weakest_model is SecurityModel.POOL
    assert config.node.bind == ("192.0.2.1:1811", "[2001:db8::1]:99")
    assert config.node.front_user == "kvmsec-net"
    assert config.remote.disk_folders == (Path("/srv/disks"),)
    assert config.remote.kernel_folders == (Path("/srv/boot"),)
    assert config.remote.firmware_folders == (Path("/usr/share/OVMF"),)
    assert config.remote.qemu_programs == (Path("/usr/bin/qemu-system-x86_64"),)
    assert (config.remote.bridges, config.remote.taps) == (("br0",), ("tap7",))
    assert config.cluster.copy_valid_s == 600


@pytest.mark.root
def test_showing_tells_what_was_written_from_what_is_a_default(place: Path) -> None:
    place.write_text('[uids]\nfreed_ranges = "61001, 61000"\n[firewall]\nbackend = "auto"\n')
    shown = {setting.key: (setting.value, setting.origin) for setting in show_config(place)}

    assert shown["uids.freed_ranges"] == ("61000-61001", str(place))
    assert shown["firewall.backend"] == ("auto", str(place))
    assert shown["uids.reuse_delay_s"] == (60, "default")
    assert shown["security.weakest_model"] == ("none", "default")
    assert shown["qemu.extra_arguments"] == ([], "default")


def test_all_faults_are_named_together_with_table_and_key() -> None:
    problems = faults(
        {
            "firewall": {"backend": "ipfw", "log_prefix": "x" * 30, "log_group": 65536},
            "uids": {"reuse_delay_s": -1, "freed_ranges": "5-3"},
            "qemu": {"path": "qemu", "extra_arguments": "-no-hpet", "ready_timeout_s": 0},
            "limits": {"log_kib": True},
            "security": {"weakest_model": "root"},
        }
    )

    assert [problem.split(":")[0] for problem in problems] == [
        "firewall.backend",
        "firewall.log_prefix",
        "firewall.log_group",
        "uids.reuse_delay_s",
        "uids.freed_ranges",
        "qemu.path",
        "qemu.extra_arguments",
        "qemu.ready_timeout_s",
        "limits.log_kib",
        "security.weakest_model",
    ]


@pytest.mark.root
def test_who_may_not_read_the_file_is_sent_to_root(place: Path) -> None:
    place.write_text(WHOLE)
    place.chmod(0o600)

    with acting_as(Credentials(NOBODY, NOBODY)), pytest.raises(BadConfig) as caught:
        load_config(place)

    assert caught.value.hint == "run it as root, or with sudo"


def test_an_unknown_key_is_refused_with_the_one_that_was_meant() -> None:
    problems = faults({"firewal": {}, "firewall": {"bakend": "auto"}, "zzz": {}})

    assert problems[0] == "firewal: unknown table; did you mean firewall?"
    assert problems[1] == "firewall.bakend: unknown setting; did you mean backend?"
    assert problems[2].startswith("zzz: unknown table; there are firewall, uids")


@pytest.mark.parametrize("key", ["a\nb", "\x1b[31m", "é", "x" * 4096])
def test_no_key_of_the_file_reaches_the_terminal_raw(key: str) -> None:
    (problem,) = faults({"uids": {key: 1}})
    assert problem.isprintable()
    assert problem.isascii()
    assert len(problem) < 200


@pytest.mark.parametrize(
    "prefix", ["", "   ", "a\nb", "ganeti uid pool user network traffic", 'a"b']
)
def test_a_log_prefix_that_the_kernel_would_not_keep_is_refused(prefix: str) -> None:
    (problem,) = faults({"firewall": {"log_prefix": prefix}})
    assert problem.startswith("firewall.log_prefix: ")


@pytest.mark.parametrize("parent", ["", "/", "..", "a/../b", "a//b", "a/./b", ".a", "a b", "a\n"])
def test_a_cgroup_parent_never_leads_out_of_the_tree(parent: str) -> None:
    (problem,) = faults({"cgroup": {"parent": parent}})
    assert problem.startswith("cgroup.parent: ")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1, 10**400, "30", True])
def test_a_deadline_is_a_sensible_number(value: object) -> None:
    (problem,) = faults({"qemu": {"ready_timeout_s": value}})
    assert problem.startswith("qemu.ready_timeout_s: ")
    assert len(problem) < 200


def test_a_table_that_is_none_is_refused() -> None:
    assert faults({"qemu": 3}) == ("qemu: must be a table, not a whole number",)


@pytest.mark.root
def test_no_file_means_the_defaults(place: Path) -> None:
    assert load_config(place) == Config()
    assert load_config(place / "below/nothing") == Config()


@pytest.mark.root
@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"[uids\n", id="cut short"),
        pytest.param(b"\xff\xfe", id="not UTF-8"),
        pytest.param(b"a = 1\na = 2\n", id="a key twice"),
        pytest.param(b"a = " + b"[" * 20000, id="nested for ever"),
        pytest.param(b"#" * ((1 << 20) + 1), id="over a mebibyte"),
    ],
)
def test_a_garbled_file_is_an_error_that_names_it(place: Path, content: bytes) -> None:
    place.write_bytes(content)
    with pytest.raises(BadConfig) as caught:
        load_config(place)
    assert str(place) in caught.value.message
    assert caught.value.hint is not None


@pytest.mark.root
def test_a_place_that_is_no_file_is_refused_at_once(place: Path) -> None:
    os.mkfifo(place, 0o600)
    with pytest.raises(BadConfig, match="not a regular file"):
        load_config(place)
    place.unlink()

    place.symlink_to("nowhere")
    with pytest.raises(BadConfig, match="leads nowhere"):
        load_config(place)


@pytest.mark.root
@pytest.mark.parametrize("spoil", ["writable file", "foreign file", "writable directory"])
def test_a_file_that_others_can_change_is_refused(place: Path, spoil: str) -> None:
    place.write_text("")
    if spoil == "writable file":
        place.chmod(0o664)
    elif spoil == "foreign file":
        os.chown(place, 240001, 0)
    else:
        place.parent.chmod(0o777)

    with pytest.raises(BadConfig) as caught:
        load_config(place)
    assert caught.value.hint is not None
    assert "root" in caught.value.hint


def test_reading_settings_loads_no_slow_library() -> None:
    code = "import sys, kvmsec.config; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    loaded = set(done.stdout.split())

    assert "kvmsec.config" in loaded
    assert loaded.isdisjoint({"cattrs", "msgspec", "iptc", "click", "rich", "asyncio", "tomllib"})


def test_extra_qemu_arguments_are_judged_where_they_are_written() -> None:
    document = {"qemu": {"extra_arguments": ["-monitor", "stdio", "-boot", "order=c"]}}

    with pytest.raises(BadConfig) as caught:
        parse_config(document, Path("kvmsec.toml"))

    assert "qemu.extra_arguments" in str(caught.value)
    assert "-monitor" in str(caught.value)


@pytest.mark.parametrize("piece", ["cgroup-cpu", "cgroup-io", "jail", ""])
def test_what_somebody_asks_for_can_not_be_said_to_be_missing(piece: str) -> None:
    (problem,) = faults({"confinement": {"may_be_missing": ["cgroup", piece]}})

    assert problem.startswith("confinement.may_be_missing: must be one of cgroup, cgroup-memory")


def test_limits_have_the_ranges_of_a_definition() -> None:
    bad = {"cpu_weight": 0, "max_io_weight": 10_001, "cpu_quota_percent": "50%"}
    bad |= {"oom_score_adjust": 1001, "memory_margin_mib": -1}
    problems = faults({"limits": bad})

    assert [problem.split(":")[0] for problem in problems] == [f"limits.{key}" for key in bad]
    ranges = (config_module._WEIGHT, MAX_WEIGHT), (config_module._QUOTA, MAX_QUOTA)
    for rule, most in ranges:
        assert rule(most) == most
        with pytest.raises(ValueError, match=str(most)):
            rule(most + 1)


@pytest.mark.parametrize("user", ["root", "nobody", "www-data", "kvmsec-", "kvmsec-a b", ""])
def test_the_front_runs_as_a_user_that_no_instance_may_be(user: str) -> None:
    (problem,) = faults({"node": {"front_user": user}})
    assert problem == "node.front_user: must be the name of a user that begins with kvmsec-"


@pytest.mark.parametrize("bind", ["localhost", "", "192.0.2.1:0", "192.0.2.1:70000", "::1]:1"])
def test_a_node_listens_on_an_address_and_no_name(bind: str) -> None:
    (problem,) = faults({"node": {"bind": [bind]}})
    assert problem.startswith("node.bind: ")


@pytest.mark.parametrize("folder", ["/", "disks", "/srv/../etc", "/srv/..", 7])
def test_a_folder_of_remote_orders_is_one_place(folder: object) -> None:
    (problem,) = faults({"remote": {"disk_folders": [folder]}})
    assert problem.startswith("remote.disk_folders: ")


def test_nothing_may_be_named_by_a_remote_order_unless_it_is_listed() -> None:
    remote = parse_config({}, SOURCE).remote
    assert all(getattr(remote, one.name) == () for one in attrs.fields(type(remote)))
