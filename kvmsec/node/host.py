"""This node's own: its paths, settings and state, wired to the rooms once."""

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from kvmsec.config import Config, load_config
from kvmsec.paths import Paths
from kvmsec.store.file import FileStore

if TYPE_CHECKING:
    from hypervisor.cgroups import Hierarchy
    from hypervisor.nursery import Nursery
    from hypervisor.tree import Trees
    from kvmsec.node.engine import Engine
    from kvmsec.node.rules import Rules
    from uidpool.claims import Claims


class Host:
    """What every part of `kvmsec.node` works on.

    Nothing is read, made or even imported before it is needed: a listing needs little of it.
    """

    def __init__(self, paths: Paths) -> None:
        self.paths = paths
        self.store = FileStore(paths.cluster)
        self.settled: Callable[[], Mapping[int, int]] = dict
        """Instances' processes that run, and the uid of each: see `uidpool.processes.Settled`."""
        self.engines: dict[tuple[Path, str], Engine] = {}
        """By program and accelerator, what was found: see `kvmsec.node.engine.engine_for`."""
        self._is_prepared = False

    def prepare(self) -> None:
        """Make the directories, once. Raises UntrustedPath and OSError."""
        if not self._is_prepared:
            self.paths.make_directories()
            self._is_prepared = True

    @cached_property
    def config(self) -> Config:
        return load_config(self.paths.config)

    def read_settings_again(self) -> None:
        """Take the settings as they are now, from the next start on. Raises BadConfig."""
        fresh = load_config(self.paths.config)
        self.__dict__.pop("rules", None)  # They hold the firewall's settings.
        self.__dict__["config"] = fresh

    @cached_property
    def claims(self) -> "Claims":
        from uidpool.claims import Claims

        root = str(self.paths.root)
        settled = self.settled
        return Claims(self.paths.uid_leases, self.paths.uid_state, root=root, settled=settled)

    @cached_property
    def hierarchy(self) -> "Hierarchy":
        from hypervisor.cgroups import Hierarchy

        return Hierarchy.detect()

    @cached_property
    def rules(self) -> "Rules":
        from kvmsec.node.rules import Rules

        return Rules(self.paths, self.config.firewall, self.store)

    @cached_property
    def trees(self) -> "Trees":
        """What instances of this host run in: see `hypervisor.tree`."""
        from hypervisor.tree import Trees

        return Trees(str(self.paths.run))

    @cached_property
    def nursery(self) -> "Nursery":
        """What makes the processes that become QEMU: see `hypervisor.nursery`."""
        from hypervisor.nursery import Nursery

        return Nursery()

    def close(self) -> None:
        """Let go of what is kept for the next start; instances live on."""
        if "nursery" in self.__dict__:
            self.nursery.close()
        if "trees" in self.__dict__:
            self.trees.close()
