"""This node's own: its paths, settings and state, wired to the rooms once."""

from functools import cached_property

from hypervisor.cgroups import Hierarchy
from kvmsec.config import Config, load_config
from kvmsec.node.rules import Rules
from kvmsec.paths import Paths
from kvmsec.store.file import FileStore
from uidpool.claims import Claims


class Host:
    """What every part of `kvmsec.node` works on; nothing is read or made before it is needed."""

    def __init__(self, paths: Paths) -> None:
        self.paths = paths
        self.store = FileStore(paths.cluster)

    @cached_property
    def config(self) -> Config:
        return load_config(self.paths.config)

    @cached_property
    def claims(self) -> Claims:
        return Claims(self.paths.uid_leases, self.paths.uid_state, root=str(self.paths.root))

    @cached_property
    def hierarchy(self) -> Hierarchy:
        return Hierarchy.detect()

    @cached_property
    def rules(self) -> Rules:
        return Rules(self.paths, self.config.firewall, self.store)
