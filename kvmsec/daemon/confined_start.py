"""With what the front and the courier of a node are started."""

from typing import Literal

from kvmsec.config import Config
from kvmsec.daemon.confined_child import Start
from kvmsec.daemon.front_user import find_front_user
from kvmsec.errors import StoreError
from kvmsec.paths import Paths
from kvmsec.store import Store
from uidpool.ranges import EMPTY, UidRanges


def start_of(
    role: Literal["front", "courier"], paths: Paths, config: Config, store: Store
) -> Start:
    """Raises UnfitFrontUser and OSError."""
    return Start(
        name=f"kvmsec-{role}",
        program=f"kvmsec.daemon.{'front' if role == 'front' else 'courier_life'}",
        credentials=find_front_user(config.node.front_user, _pool(store)),
        mount_point=str(paths.run),
        cache=str(paths.features),
        filter_may_be_missing="seccomp" in config.confinement.may_be_missing,
    )


def _pool(store: Store) -> UidRanges:
    """The uids that the front's user may not have; a state that can't be read names none.

    Such a node serves by the last resort alone, and starts no instance.
    """
    try:
        cluster, _ = store.load()
    except StoreError:
        return EMPTY
    return EMPTY if cluster is None else cluster.guarded_uids
