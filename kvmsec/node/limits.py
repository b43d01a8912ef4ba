"""One instance's limits: its definition's wishes, within what the node's settings allow.

Pure: from values to what `hypervisor.cgroups` writes and `hypervisor.jail` sets.
"""

from collections.abc import Collection, Iterable, Iterator
from typing import Final, Literal

from attrs import frozen

from hypervisor import footprint, huge_pages
from hypervisor.cgroup_limits import GroupLimits
from hypervisor.cgroups import Lack
from hypervisor.jail import BootFile
from hypervisor.limits import UNLIMITED, ProcessLimits
from hypervisor.machine import Limits, Machine
from kvmsec.config import TOLERABLE, Config, LimitSettings
from kvmsec.errors import KvmsecError
from kvmsec.model.security import SecurityModel
from kvmsec.node import output
from kvmsec.node.grants import Lent

_MIB: Final = 1 << 20
_USUAL_WEIGHT: Final = 100  # what the kernel takes where nobody sets one
_BOUNDED_ABOVE: Final = ("cpu_weight", "cpu_quota_percent", "io_weight")


def problems_of(wishes: Limits, settings: LimitSettings) -> Iterator[str]:
    """What a definition asks for that this node allows no instance."""
    for name in _BOUNDED_ABOVE:
        wanted, most = getattr(wishes, name), getattr(settings, f"max_{name}")
        if wanted is not None and most is not None and wanted > most:
            yield f"limits.{name}: {wanted} is more than the {most} that this node allows"
    score, least = wishes.oom_score_adjust, settings.min_oom_score_adjust
    if score is not None and score < least:
        yield f"limits.oom_score_adjust: {score} is less than the {least} that this node allows"


def decide(wishes: Limits, settings: LimitSettings) -> Limits:
    """What an instance gets: what it asks for, else the node's own, within the node's bounds.

    The most CPU time that the node allows is a bound for who asks for none, too.
    """
    decided: dict[str, int | None] = {}
    for name in _BOUNDED_ABOVE:
        wanted, most = getattr(wishes, name), getattr(settings, f"max_{name}")
        chosen = getattr(settings, name) if wanted is None else wanted
        if chosen is None and most is not None:
            chosen = most if name == "cpu_quota_percent" else _USUAL_WEIGHT
        decided[name] = chosen if chosen is None or most is None else min(chosen, most)
    score = wishes.oom_score_adjust
    chosen = settings.oom_score_adjust if score is None else score
    decided["oom_score_adjust"] = max(chosen, settings.min_oom_score_adjust)
    return Limits(**decided)


@frozen
class Allotment:
    """What one start gets of its node."""

    groups: GroupLimits
    process: ProcessLimits


def allot(
    config: Config, machine: Machine, model: SecurityModel, huge_page_pools: Collection[int]
) -> Allotment:
    """The bounds of one start: of its control groups, and of its process.

    Without what other things decide that it needs: how much memory, see `memory_bytes`, and the
    size of its files, see `largest_file_bytes`. `huge_page_pools`: the sizes, in MiB, of the pages
    that the node has pools of.
    """
    granted = decide(machine.limits, config.limits)
    threads = footprint.tasks(machine)
    assert granted.oom_score_adjust is not None
    return Allotment(
        GroupLimits(
            tasks=threads,
            cpu_weight=granted.cpu_weight,
            cpu_quota_percent=granted.cpu_quota_percent,
            io_weight=granted.io_weight,
            huge_pages=huge_pages.limits_for(machine, huge_page_pools),
        ),
        ProcessLimits(
            open_files=footprint.descriptors(machine),
            # Counted for all of a uid: the same as the group's where one uid is one instance.
            processes=threads if model is SecurityModel.POOL else None,
            file_bytes=None,
            locked_bytes=UNLIMITED if _locks_memory(config) else 8 * _MIB,
            oom_score_adjust=granted.oom_score_adjust,
        ),
    )


def memory_bytes(
    config: Config,
    machine: Machine,
    accelerator: Literal["kvm", "tcg"],
    boot_files: Iterable[BootFile],
) -> int:
    """The most memory that an instance's groups may hold."""
    memory_mib = config.limits.memory_margin_mib + footprint.memory_mib(
        machine, accelerator, files_bytes=sum(_own_files_bytes(config, boot_files))
    )
    if _locks_memory(config):
        memory_mib += footprint.locked_mib(machine)
    return memory_mib * _MIB


def largest_file_bytes(config: Config, machine: Machine, lent: Lent) -> int:
    """The most that a file of an instance's may hold: of its disks, and of all else it writes."""
    files = _own_files_bytes(config, lent.boot_files)
    if machine.hugepages is not None:
        files.append(machine.memory_mib * _MIB)
    written = [image.largest_bytes for chain in lent.disks for image in chain if not image.readonly]
    return footprint.largest_file_bytes(written, files=files)


def _own_files_bytes(config: Config, boot_files: Iterable[BootFile]) -> list[int]:
    """What a jail holds in file systems of its own, which is memory."""
    sizes = [file.size_bytes for file in boot_files]
    return [*sizes, output.room_bytes(config.limits.log_kib)]


def _locks_memory(config: Config) -> bool:
    """Whether QEMU is told to keep all of its memory, which the control group bounds, in RAM."""
    return any("mem-lock=on" in argument.split(",") for argument in config.qemu.extra_arguments)


class NoCgroup(KvmsecError):
    """An instance can't have the control groups that are to hold it on this host."""

    def __init__(self, lacks: Collection[Lack]) -> None:
        problems = "; ".join(map(str, lacks))
        pieces = [lack.piece for lack in lacks]
        super().__init__(
            f"the instance can't be held by control groups: {problems}", hint=_advice(pieces)
        )
        self.lacks = tuple(lacks)


def require(lacks: Iterable[Lack], may_be_missing: Collection[str]) -> None:
    """Raise NoCgroup for what is missing, unless the node's settings say that it may be."""
    refused = [lack for lack in lacks if not is_tolerated(lack, may_be_missing)]
    if refused:
        raise NoCgroup(refused)


def is_tolerated(lack: Lack, may_be_missing: Collection[str]) -> bool:
    """Whether an instance may do without; `cgroup` stands for each piece that ever may."""
    return lack.piece in TOLERABLE and not {"cgroup", lack.piece}.isdisjoint(may_be_missing)


def _advice(pieces: Collection[str]) -> str:
    there = "mount it or hand it down (cgroups(7)), or name another parent with cgroup.parent"
    asked = [piece.removeprefix("cgroup-") for piece in pieces if piece not in TOLERABLE]
    if asked:
        return (
            f"{there}; or ask for no limit of {' and '.join(asked)}: [limits] in the definition "
            "and in kvmsec.toml"
        )
    missing = ["cgroup"] if "cgroup" in pieces else dict.fromkeys(pieces)
    named = ", ".join(f'"{piece}"' for piece in missing)
    return f"{there}; or do without: confinement.may_be_missing = [{named}] in kvmsec.toml"
