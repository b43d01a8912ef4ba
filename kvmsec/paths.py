"""Where everything lies: every path of kvmsec, below one root that can be moved.

What belongs to the kernel does not move with it. A uid is the host's, whatever root an instance
was started from, and so is an image: leases, resting uids and what says which images are open
have one place for all roots. The packet rules of each root go by a name of their own (`tag`), so
that two roots never touch each other's.
"""

import hashlib
import os
from functools import cached_property, lru_cache
from pathlib import Path

from attrs import field, frozen

from kvmsec.linux.files import make_private_directory, require_steady
from kvmsec.model.names import require_name

_HOST_RUN = Path("/run/kvmsec")
_HOST_VAR = Path("/var/lib/kvmsec")


def _resolved(root: Path | str) -> Path:
    return Path(root).resolve()


@frozen
class InstancePaths:
    """The files of one instance while it has a record; all of them are gone after its stop."""

    directory: Path

    @cached_property
    def record(self) -> Path:
        return self.directory / "record.json"

    @cached_property
    def qmp_socket(self) -> Path:
        return self.directory / "qmp.sock"

    @cached_property
    def serial_socket(self) -> Path:
        return self.directory / "serial.sock"

    @cached_property
    def output(self) -> Path:
        """Where the instance's sized filesystem is mounted: its own output, and nothing else."""
        return self.directory / "output"

    def make(self) -> None:
        """Make the instance's directories (0700). Raises UntrustedPath and OSError."""
        for directory in (self.directory, self.output):
            make_private_directory(directory)


@lru_cache
def _instance_paths(instances: Path, name: str) -> InstancePaths:
    return InstancePaths(instances / name)


@frozen(cache_hash=True)
class Paths:
    """Every path of a kvmsec whose files lie below `root` (links in it are resolved once)."""

    root: Path = field(default=Path("/"), converter=_resolved)

    # Each is made once: a start asks for them some hundred times, and to make one takes 10 us.
    # Names that become paths are checked here as well: this is the last place before the disk.

    @cached_property
    def etc(self) -> Path:
        return self.root / "etc/kvmsec"

    @cached_property
    def config(self) -> Path:
        return self.etc / "kvmsec.toml"

    @cached_property
    def definitions(self) -> Path:
        return self.etc / "instances"

    def definition(self, name: str) -> Path:
        """The definition of an instance. Raises BadName."""
        return self.definitions / f"{require_name('an instance', name)}.toml"

    @cached_property
    def var(self) -> Path:
        return self.root / "var/lib/kvmsec"

    @cached_property
    def cluster(self) -> Path:
        return self.var / "cluster.json"

    @property
    def key_files(self) -> Path:
        """The directory of the certificates and keys (`kvmsec.pki.files.KeyFiles`)."""
        return self.var

    @property
    def renewal(self) -> Path:
        """A renewal of certificates that is under way; on the master only."""
        return self.var / "renewal.json"

    @property
    def invitations(self) -> Path:
        """The join tokens that are not spent; on the master only."""
        return self.var / "invitations.json"

    @cached_property
    def features(self) -> Path:
        """The directory where QEMU's features are kept once they were asked for."""
        return self.var / "features"

    @cached_property
    def last_states(self) -> Path:
        return self.var / "instances"

    def last_state(self, name: str) -> Path:
        """How an instance ended, for those who ask later. Raises BadName."""
        return self.last_states / f"{require_name('an instance', name)}.json"

    @cached_property
    def run(self) -> Path:
        return self.root / "run/kvmsec"

    @cached_property
    def instances(self) -> Path:
        return self.run / "instances"

    def instance(self, name: str) -> InstancePaths:
        """The files of an instance that runs. Raises BadName."""
        return _instance_paths(self.instances, require_name("an instance", name))

    @cached_property
    def locks(self) -> Path:
        return self.run / "locks"

    def instance_lock(self, name: str) -> Path:
        """The lock of whoever acts on an instance; it outlives the instance's files."""
        return self.locks / require_name("an instance", name)

    @property
    def orders(self) -> Path:
        """Who ordered what of this node's daemon."""
        return self.log / "orders.jsonl"

    @cached_property
    def images_lock(self) -> Path:
        """The lock under which it is decided who may open which image: one for all roots."""
        return _HOST_RUN / "images.lock"

    @cached_property
    def image_holdings(self) -> Path:
        """What instances have open: one place for all roots of this host."""
        return _HOST_RUN / "images"

    @property
    def node_socket(self) -> Path:
        """Where the command line reaches this node's daemon."""
        return self.run / "node.sock"

    @cached_property
    def log(self) -> Path:
        return self.root / "var/log/kvmsec"

    @cached_property
    def instance_logs(self) -> Path:
        return self.log / "instances"

    def instance_log(self, name: str) -> Path:
        """The log that kvmsec keeps of an instance. Raises BadName."""
        return self.instance_logs / f"{require_name('an instance', name)}.log"

    def instance_output(self, name: str) -> Path:
        """What an instance said in its last run, copied off at its end. Raises BadName."""
        return self.instance_logs / f"{require_name('an instance', name)}.output"

    @cached_property
    def uid_leases(self) -> Path:
        """Who holds which uid: one place for all roots of this host."""
        return _HOST_RUN / "uids"

    @cached_property
    def uid_state(self) -> Path:
        """What rests or is quarantined: one place for all roots, and kept over a reboot."""
        return _HOST_VAR / "uids"

    @cached_property
    def tag(self) -> str:
        """What the packet rules of this root go by: `kvmsec`, or `kvmsec_` and 8 hex digits."""
        if self.root == Path("/"):
            return "kvmsec"
        return f"kvmsec_{hashlib.sha256(os.fsencode(self.root)).hexdigest()[:8]}"

    def make_directories(self) -> None:
        """Make every directory that kvmsec writes to, 0700 and the caller's.

        Raises UntrustedPath when somebody else could move one of them away, and OSError.
        """
        require_steady(self.root)
        # Parents first: what is missing above a private directory would be made readable to all.
        for directory in (
            self.etc,
            self.definitions,
            self.var,
            self.features,
            self.last_states,
            self.run,
            self.instances,
            self.locks,
            self.log,
            self.instance_logs,
            _HOST_RUN,
            self.uid_leases,
            self.image_holdings,
            _HOST_VAR,
            self.uid_state,
        ):
            make_private_directory(directory)
