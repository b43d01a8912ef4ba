"""The node's own settings: kvmsec.toml, root's alone.

Every setting stands once: its name, its default and the rule for what may be written. A file is
read whole, all its faults are reported together, and a key that this release does not honour is a
fault: a setting that is silently ignored protects nobody. The rules are plain functions and no
cattrs converter, since every command reads this file (cattrs alone costs 30 ms of import) and
attrs validators would stop at a table's first fault.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal, cast

import attrs
from attrs import field, frozen

from firewall.errors import PolicyError
from firewall.policy import GROUP_LIMIT, LogSettings
from kvmsec.errors import BadConfig
from kvmsec.linux.errors import UntrustedPath
from kvmsec.linux.files import require_trusted
from kvmsec.model import rules
from kvmsec.model.documents import describe_failure, read_document
from kvmsec.model.rules import Rule, kind_of, shown_key, unknown_key
from kvmsec.model.security import SecurityModel
from uidpool.ranges import EMPTY, UidRanges

TOLERABLE: Final = (
    *("cgroup", "cgroup-memory", "cgroup-pids", "cgroup-hugetlb"),
    *("seccomp", "session-keyring"),
)
"""Pieces of confinement that `confinement.may_be_missing` may name; `cgroup` stands for all of its.

CPU and I/O are bounded where somebody asks for it, and what is asked for can't be missing.
"""


# Rules of a single setting (the others are in kvmsec.model.rules) ----------------------------


def _rule(rule: Rule[Any]) -> Mapping[str, Rule[Any]]:
    """What `_parse_table` looks for beside a setting."""
    return {"rule": rule}


def _freed_ranges(value: object) -> UidRanges:
    freed = rules.uid_ranges(value)
    from uidpool.accounts import AccountRules  # only who frees a range pays for it

    return AccountRules(freed=freed).freed


def _log_prefix(value: object) -> str:
    try:
        return LogSettings(prefix=rules.text(value)).prefix
    except PolicyError as error:
        raise ValueError("; ".join(error.problems)) from error


_CGROUP_STEP: Final = re.compile(r"[A-Za-z0-9_@][A-Za-z0-9_.@-]{0,126}")


def _cgroup_path(value: object) -> str:
    """A path below the cgroup root; a step never begins with a dot, so none can lead upwards."""
    path = rules.text(value).strip("/")
    if not all(_CGROUP_STEP.fullmatch(step) for step in path.split("/")):
        raise ValueError("must be a path below the cgroup root such as machine.slice/kvmsec")
    return path


def _extra_arguments(value: object) -> tuple[str, ...]:
    from hypervisor.errors import ForbiddenArguments
    from hypervisor.extra_arguments import check_extra_arguments  # few nodes have any

    arguments = rules.list_of(rules.text)(value)
    try:
        return check_extra_arguments(arguments)
    except ForbiddenArguments as error:
        raise ValueError("; ".join(map(str, error.problems))) from error


def _front_user(value: object) -> str:
    """Users of that prefix are kvmsec's own, and no instance may be one (uidpool.accounts)."""
    name = rules.text(value)
    if not _FRONT_USER.fullmatch(name):
        raise ValueError("must be the name of a user that begins with kvmsec-")
    return name


_FRONT_USER: Final = re.compile(r"kvmsec-[a-z0-9_-]{1,24}")  # useradd(8): 32 characters


def _bind(value: object) -> str:
    from kvmsec.model.addresses import parse_bind  # only a node that serves pays for it

    return str(parse_bind(rules.text(value)))


def _folder(value: object) -> Path:
    """A folder as the kernel would take it: `..` would make another of it once links are there."""
    path = rules.absolute_path(value)
    if ".." in path.parts:
        raise ValueError("must hold no ..")
    if path == Path("/"):
        raise ValueError("must not be /, which would allow everything")
    return path


_INTERFACE: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,14}")  # as in hypervisor.machine


def _interface(value: object) -> str:
    name = rules.text(value)
    if not _INTERFACE.fullmatch(name):
        raise ValueError("must be a network interface's name (at most 15 of A-Za-z0-9_.-)")
    return name


_WEIGHT: Final = rules.whole_number(1, 10_000)  # hypervisor.machine has the sources of these
_QUOTA: Final = rules.whole_number(1, 100 * 8192)
_OOM_SCORE: Final = rules.whole_number(-1000, 1000)


# Settings ------------------------------------------------------------------------------------

Backend = Literal["auto", "nftables", "iptables"]


@frozen
class FirewallSettings:
    """`[firewall]`: which packet filter, and how it logs what it drops."""

    backend: Backend = field(
        default="auto", metadata=_rule(rules.one_of("auto", "nftables", "iptables"))
    )
    log_prefix: str = field(default=LogSettings().prefix, metadata=_rule(_log_prefix))
    log_group: int | None = field(default=None, metadata=_rule(rules.whole_number(0, GROUP_LIMIT)))


@frozen
class UidSettings:
    """`[uids]`: how long a released uid rests, and which foreign ranges this host leaves free."""

    reuse_delay_s: int = field(default=60, metadata=_rule(rules.whole_number(0, 86400 * 30)))
    freed_ranges: UidRanges = field(default=EMPTY, metadata=_rule(_freed_ranges))


@frozen
class QemuSettings:
    """`[qemu]`: which program, what it is given besides, and how long it has until it is ready."""

    path: Path | None = field(default=None, metadata=_rule(rules.absolute_path))
    extra_arguments: tuple[str, ...] = field(default=(), metadata=_rule(_extra_arguments))
    ready_timeout_s: float = field(default=30.0, metadata=_rule(rules.seconds(0.1, 3600)))


@frozen
class LimitSettings:
    """`[limits]`: what an instance gets that doesn't ask, and the most that it may ask for.

    `kvmsec.node.limits` makes one instance's limits of these and of its definition.
    """

    log_kib: int = field(default=1024, metadata=_rule(rules.whole_number(16, 1 << 20)))
    max_memory_mib: int | None = field(default=None, metadata=_rule(rules.whole_number(1, 1 << 24)))
    max_vcpus: int | None = field(default=None, metadata=_rule(rules.whole_number(1, 1 << 12)))
    memory_margin_mib: int = field(default=64, metadata=_rule(rules.whole_number(0, 1 << 20)))
    cpu_weight: int | None = field(default=None, metadata=_rule(_WEIGHT))
    max_cpu_weight: int | None = field(default=None, metadata=_rule(_WEIGHT))
    cpu_quota_percent: int | None = field(default=None, metadata=_rule(_QUOTA))
    max_cpu_quota_percent: int | None = field(default=None, metadata=_rule(_QUOTA))
    io_weight: int | None = field(default=None, metadata=_rule(_WEIGHT))
    max_io_weight: int | None = field(default=None, metadata=_rule(_WEIGHT))
    oom_score_adjust: int = field(default=100, metadata=_rule(_OOM_SCORE))
    min_oom_score_adjust: int = field(default=0, metadata=_rule(_OOM_SCORE))


@frozen
class CgroupSettings:
    """`[cgroup]`: below which group the instances' are made (None: kvmsec's own)."""

    parent: str | None = field(default=None, metadata=_rule(_cgroup_path))


@frozen
class ConfinementSettings:
    """`[confinement]`: what this host may lack without a start being refused."""

    may_be_missing: tuple[str, ...] = field(
        default=(), metadata=_rule(rules.list_of(rules.one_of(*TOLERABLE)))
    )


@frozen
class SecuritySettings:
    """`[security]`: the weakest model that an instance of this node may have."""

    weakest_model: SecurityModel = field(
        default=SecurityModel.NONE, metadata=_rule(rules.security_model)
    )


@frozen
class NodeSettings:
    """`[node]`: what `kvmsec node serve` listens on, and as whom its front runs.

    bind: `ADDRESS`, `ADDRESS:PORT` or `[ADDRESS]:PORT`; none: every address of the node.
    """

    bind: tuple[str, ...] = field(default=(), metadata=_rule(rules.list_of(_bind)))
    front_user: str = field(default="kvmsec-front", metadata=_rule(_front_user))


@frozen
class RemoteSettings:
    """`[remote]`: what an order of another node may name; nothing, unless it is listed."""

    disk_folders: tuple[Path, ...] = field(default=(), metadata=_rule(rules.list_of(_folder)))
    kernel_folders: tuple[Path, ...] = field(default=(), metadata=_rule(rules.list_of(_folder)))
    firmware_folders: tuple[Path, ...] = field(default=(), metadata=_rule(rules.list_of(_folder)))
    qemu_programs: tuple[Path, ...] = field(default=(), metadata=_rule(rules.list_of(_folder)))
    bridges: tuple[str, ...] = field(default=(), metadata=_rule(rules.list_of(_interface)))
    taps: tuple[str, ...] = field(default=(), metadata=_rule(rules.list_of(_interface)))
    security_domains: tuple[str, ...] = field(default=(), metadata=_rule(rules.list_of(rules.text)))


@frozen
class ClusterSettings:
    """`[cluster]`: how long the copy of the cluster's state is good for, once it was confirmed."""

    copy_valid_s: int = field(default=3600, metadata=_rule(rules.whole_number(60, 86400 * 365)))


@frozen
class Config:
    """kvmsec.toml: a table each."""

    firewall: FirewallSettings = FirewallSettings()
    uids: UidSettings = UidSettings()
    qemu: QemuSettings = QemuSettings()
    limits: LimitSettings = LimitSettings()
    cgroup: CgroupSettings = CgroupSettings()
    confinement: ConfinementSettings = ConfinementSettings()
    security: SecuritySettings = SecuritySettings()
    node: NodeSettings = NodeSettings()
    remote: RemoteSettings = RemoteSettings()
    cluster: ClusterSettings = ClusterSettings()


# Reading -------------------------------------------------------------------------------------


def load_config(path: Path) -> Config:
    """The node's settings; the defaults where there is no file.

    Raises BadConfig with every fault found: of the file (root's, writable by nobody else), of its
    syntax, of its keys and values.
    """
    return parse_config(_read(path), path)


def _read(path: Path) -> dict[str, object]:
    try:
        require_trusted(path)
        return read_document(path)
    except FileNotFoundError:
        if path.is_symlink():
            raise BadConfig(path, ["is a symbolic link that leads nowhere"]) from None
        return {}
    except UntrustedPath as error:
        raise BadConfig(path, [error.told_of(path)], hint=error.hint) from error
    except PermissionError as error:
        hint = "run it as root, or with sudo"
        raise BadConfig(path, [describe_failure(error)], hint=hint) from error
    except (OSError, ValueError) as error:
        raise BadConfig(path, [describe_failure(error)]) from error


def parse_config(document: Mapping[str, object], source: Path) -> Config:
    """The settings that a document holds. Raises BadConfig with every fault in it."""
    problems: list[str] = []
    tables = {table.name: table for table in attrs.fields(Config)}
    parsed: dict[str, Any] = {}
    for name, content in document.items():
        if name not in tables:
            problems.append(f"{shown_key(name)}: {unknown_key(name, tables, 'table')}")
        elif not isinstance(content, Mapping):
            problems.append(f"{name}: must be a table, not {kind_of(content)}")
        else:
            parsed[name] = _parse_table(_kind_of_table(tables[name]), name, content, problems)
    if problems:
        raise BadConfig(source, problems)
    return attrs.evolve(Config(), **parsed)


def _parse_table(
    kind: type[Any], table: str, content: Mapping[str, object], problems: list[str]
) -> object:
    settings = {setting.name: setting for setting in attrs.fields(kind)}
    values: dict[str, object] = {}
    for key, value in content.items():
        if key not in settings:
            advice = unknown_key(key, settings, "setting")
            problems.append(f"{table}.{shown_key(key)}: {advice}")
            continue
        try:
            values[key] = settings[key].metadata["rule"](value)
        except ValueError as error:
            problems.append(f"{table}.{key}: {error}")
    return kind(**values)


def _kind_of_table(table: "attrs.Attribute[Any]") -> type[Any]:
    return cast(type[Any], table.type)


# Showing -------------------------------------------------------------------------------------


@frozen
class Setting:
    """A setting in effect: its `table.key`, its value as JSON has it, and where it comes from."""

    key: str
    value: object
    origin: str


def show_config(path: Path) -> tuple[Setting, ...]:
    """Every setting in effect, with `origin` "default" or the file. Raises BadConfig."""
    document = _read(path)
    config = parse_config(document, path)
    return tuple(
        Setting(
            key=f"{table.name}.{setting.name}",
            value=_plain(getattr(getattr(config, table.name), setting.name)),
            origin=str(path) if _names(document, table.name, setting.name) else "default",
        )
        for table in attrs.fields(Config)
        for setting in attrs.fields(_kind_of_table(table))
    )


def _names(document: Mapping[str, object], table: str, key: str) -> bool:
    content = document.get(table)
    return isinstance(content, Mapping) and key in content


def _plain(value: object) -> object:
    if isinstance(value, SecurityModel):
        return value.value
    if isinstance(value, UidRanges | Path):
        return str(value)
    return [_plain(one) for one in value] if isinstance(value, tuple) else value
