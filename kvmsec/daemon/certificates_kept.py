"""What a daemon does for certificates from time to time.

It removes a common pair that is over; on the master it lets members catch up with a renewal that
they missed. Where there is nothing to do it costs a look for two files.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

from kvmsec.config import Config
from kvmsec.linux.errors import Fault
from kvmsec.node.journal import note
from kvmsec.paths import Paths
from kvmsec.store import Store

EVERY_S: Final = 30.0
"""A node that is back waits no longer than that for its new certificate."""


class CertificatesKept:
    """Looks after the files of the node at `paths`.

    `refresh` has the front know what they hold; `say` prints a line.
    """

    def __init__(
        self,
        paths: Paths,
        config: Callable[[], Config],
        store: Store,
        refresh: Callable[[], Awaitable[None]],
        say: Callable[[str], None],
    ) -> None:
        self._paths = paths
        self._config = config
        self._store = store
        self._refresh = refresh
        self._say = say
        self._behind: Mapping[str, str] = {}
        self._trouble: str | None = None

    async def run(self) -> None:
        """Go on until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(EVERY_S)

    async def look(self) -> None:
        """One look; what can't be done is said, once, and tried again at the next."""
        try:
            self._remove_expired()
            await self._catch_up()
            self._trouble = None
        except (Fault, OSError) as error:
            if str(error) != self._trouble:
                self._say(f"certificates could not be looked after: {error}")
            self._trouble = str(error)

    def _remove_expired(self) -> None:
        path = self._paths.key_files / "certless.pem"
        if not (path.is_symlink() or path.exists()):
            return
        from kvmsec.cluster.certless import remove_expired
        from kvmsec.daemon.renewing import now
        from kvmsec.pki.files import KeyFiles

        remove_expired(KeyFiles(self._paths.key_files), now(), self._log)

    def _log(self, line: str) -> None:
        note(self._paths.log / "cluster.log", line)
        self._say(line)

    async def _catch_up(self) -> None:
        if not self._paths.renewal.exists():
            self._tell({})
            return
        cluster, _ = self._store.load()
        identity = self._store.identity()
        if cluster is None or identity is None or cluster.master != identity.uuid:
            return  # The journal of a time in which this node was the master.
        from kvmsec.cluster.renewal.operations import catch_up_certificates
        from kvmsec.daemon.renewing import Means

        means = Means(
            paths=self._paths,
            config=self._config,
            store=self._store,
            after_change=self._refresh,
            on_step=lambda step: None,
        )
        async with means.renewing() as work:
            outcome = await catch_up_certificates(work)
        if outcome is not None:
            self._tell(outcome.behind)
            if outcome.is_at_its_end:
                self._say("every node has its new certificate, and the old ones are forgotten")

    def _tell(self, behind: Mapping[str, str]) -> None:
        for name, why in behind.items():
            if name not in self._behind:
                self._say(f"{name} has not got its new certificate yet: {why}")
        for name in self._behind:
            if name not in behind:
                self._say(f"{name} has caught up with the renewal")
        self._behind = behind
