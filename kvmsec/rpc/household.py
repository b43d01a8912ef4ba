"""What a node is asked for beside its instances: its copy of the state, its keys, its joining.

`Household` is served by a node's daemon and, over any transport, by `kvmsec.rpc.remote`.
"""

from typing import Protocol

from kvmsec.agent import Finding
from kvmsec.model.instance import InstanceDefinition
from kvmsec.rpc import messages as m
from kvmsec.rpc.wire import Caller
from uidpool.ranges import UidRanges


class Household(Protocol):
    """A node as a member of a cluster. Every call may raise a Fault."""

    async def info(self) -> m.NodeInfo:
        """Who it is, and how far its copy of the cluster's state is."""
        ...

    async def examine(self, pool: UidRanges) -> m.Examination:
        """What `cluster verify` wants to know of it; changes nothing."""
        ...

    async def provision(self, pool: UidRanges) -> m.Provisioned:
        """Make the pool's users."""
        ...

    async def leave(self) -> None:
        """Forget the cluster: its state, certificates and rules."""
        ...

    async def get_state(self) -> m.State:
        """Its copy of the cluster's state."""
        ...

    async def put_state(self, state: m.State) -> int:
        """Take a copy over, unless its own is newer; returns the revision that it has then."""
        ...

    async def prepare(self, request: m.PrepareRequest) -> m.Prepared:
        """Trust these anchors from now on, and make a key to be signed."""
        ...

    async def commit(self, request: m.CommitRequest) -> None:
        """Serve and call with this certificate of the key that was prepared."""
        ...

    async def rollback(self) -> None:
        """Go back to what was before `prepare`."""
        ...

    async def finish(self, request: m.FinishRequest) -> None:
        """Trust these anchors alone, and forget what a rollback would need."""
        ...

    async def put_file(self, request: m.FileRequest) -> None:
        """Put one of a fixed list of files in place."""
        ...


class Threshold(Protocol):
    """What only a daemon itself knows: what a caller may order, who may join, what it needs.

    `caller` is None for root of this host.
    """

    async def admit_start(
        self, definition: InstanceDefinition, revision: int, caller: Caller | None
    ) -> None:
        """Return if this caller may have this started.

        Raises StaleCopy where this node's copy is older than `revision`, and a Fault for what the
        node's settings let no remote order name.
        """
        ...

    async def doctor(self) -> tuple[Finding, ...]:
        """Whether this host is ready, its daemon's part included."""
        ...

    async def hello(self, request: m.JoinRequest, caller: Caller | None) -> m.JoinAnswer:
        """Show to whoever knows the join token that this node knows it, too."""
        ...

    async def admit(self, request: m.AdmitRequest, caller: Caller | None) -> m.NodeInfo:
        """Become a member."""
        ...
