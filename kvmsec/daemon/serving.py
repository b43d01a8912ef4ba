"""A node's daemon: the root part, its front, and what holds them together."""

import asyncio
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from kvmsec.cluster.upkeep import upkeep
from kvmsec.config import load_config
from kvmsec.daemon import systemd
from kvmsec.daemon.certificates_kept import CertificatesKept
from kvmsec.daemon.confined_child import Start
from kvmsec.daemon.confined_start import start_of
from kvmsec.daemon.front_keeper import FrontKeeper
from kvmsec.daemon.household import Household
from kvmsec.daemon.listening import listen_on, local_socket
from kvmsec.daemon.orders import OrderJournal
from kvmsec.daemon.root_part import RootPart
from kvmsec.daemon.trust_source import TrustSource
from kvmsec.daemon.ways import Ways
from kvmsec.errors import NotRoot
from kvmsec.linux.errors import Fault
from kvmsec.node import records
from kvmsec.node.candidates import write_candidates
from kvmsec.node.local import LocalNode
from kvmsec.node.reconcile import is_true
from kvmsec.rpc.service import Service

_ORDERS_END_WITHIN_S: Final = 60.0
_LOOK_S: Final = 0.05

Say = Callable[[str], None]


async def serve(root: Path, binds: Sequence[str], say: Say) -> None:
    """Serve a node until SIGTERM or SIGINT; its instances live on.

    `binds` are addresses to listen on (`kvmsec.model.addresses`); none: those of `node.bind`.
    Sockets that systemd handed over go before both. For a process with one thread. Raises NotRoot,
    CannotListen, UnfitFrontUser, ConfinementFailed, FrontFailed, BadConfig, OSError.
    """
    began = time.monotonic()
    given = systemd.take_sockets()
    node = LocalNode(root)
    if os.geteuid() != 0:
        raise NotRoot("serving a node")
    node.host.prepare()
    load_config(node.host.paths.config)
    try:
        with local_socket(node.host.paths.node_socket) as listener:
            await _Daemon(node, binds, given, say).run(listener, began)
    finally:
        await node.close()


class _Daemon:
    def __init__(
        self, node: LocalNode, binds: Sequence[str], given: Sequence[socket.socket], say: Say
    ) -> None:
        self._node = node
        self._binds = binds
        self._given = given
        self._say = say
        self._household = Household(node)
        self._source = TrustSource(
            node.host.paths, node.host.store, joining=self._household.joining.message
        )
        self._told_to_end = asyncio.Event()

    async def run(self, listener: socket.socket, began: float) -> None:
        paths = self._node.host.paths
        async with Service(self._node, self._household) as service, self._ways() as ways:
            journal = OrderJournal(paths.orders, complain=self._say)
            root_part = RootPart(service, self._source, journal, self._say)
            keeper = FrontKeeper(
                self._start,
                self._source,
                root_part.answer_front,
                self._listen,
                self._say,
                ways.refresh,
            )
            root_part.refresh, root_part.held = keeper.refresh, keeper.held
            root_part.left = ways.refresh
            self._handle_signals(keeper)
            watching = asyncio.create_task(self._report_events())
            self._report_found(began)
            await self._follow_state()
            await keeper.refresh()
            self._report_serving(keeper)
            local = asyncio.create_task(root_part.serve_local(listener))
            keeping = asyncio.create_task(keeper.run())
            mending = asyncio.create_task(self._reconcile())
            tending = asyncio.create_task(self._tend_members(ways))
            renewing = asyncio.create_task(self._keep_certificates(keeper).run())
            systemd.notify("READY=1")
            try:
                await self._until_the_end(local, keeping, tending, renewing)
            finally:
                systemd.notify("STOPPING=1")
                await _end(keeping, tending, renewing)
                await keeper.stop()
                await self._let_orders_end(root_part)
                await _end(local, watching, mending)

    def _start(self) -> Start:
        host = self._node.host
        return start_of("front", host.paths, host.config, host.store)

    def _listen(self) -> Sequence[socket.socket]:
        if self._given:
            return [one.dup() for one in self._given]  # What systemd gave is given once.
        return listen_on(self._binds or self._node.host.config.node.bind)

    async def _follow_state(self) -> None:
        """Bring the list of candidates and the packet rules up to the state, before READY.

        A boot has taken the rules, and a daemon that was killed may have left either undone. Where
        it can't be done it is said; no instance starts then whose rules are not proved to hold.
        """
        host = self._node.host
        try:
            if self._source.is_member():
                write_candidates(host.paths, host.store)
        except Fault as error:
            self._say(f"the list of candidates is left as it is: {error.message}")
        try:
            if host.store.load()[0] is not None:
                await host.rules.sync()
        except (Fault, OSError) as error:
            self._say(f"the packet rules are left as they are: {error}")

    # Instances ---------------------------------------------------------------------------------

    def _report_found(self, began: float) -> None:
        found, unreadable = records.read_all(self._node.host.paths)
        running = [one.name for one in found if is_true(one)]
        took_ms = (time.monotonic() - began) * 1000
        self._say(f"{len(running)} running instances found within {took_ms:.0f} ms")
        for error in unreadable:
            self._say(error.message)

    async def _report_events(self) -> None:
        """Say what becomes of instances; those that died without a daemon are told first."""
        async for event in self._node.events():
            reason = f": {event.reason}" if event.reason else ""
            self._say(f"instance {event.instance} {event.state.value}{reason}")

    async def _reconcile(self) -> None:
        # After those that listen: what an end leaves behind is theirs to take back and to tell.
        await asyncio.sleep(0)
        try:
            for line in await self._node.reconcile():
                self._say(line)
        except (Fault, OSError) as error:
            self._say(f"what killed processes left could not be put right: {error}")

    def _ways(self) -> Ways[LocalNode]:
        host = self._node.host
        return Ways(host.paths, lambda: host.config, host.store, self._node)

    async def _tend_members(self, ways: Ways[LocalNode]) -> None:
        """On the master: confirm every member's copy, for as long as this daemon serves."""
        host = self._node.host
        await upkeep(
            host.store, ways, copy_valid_s=host.config.cluster.copy_valid_s, report=self._say
        )

    def _keep_certificates(self, keeper: FrontKeeper) -> CertificatesKept:
        host = self._node.host
        return CertificatesKept(
            host.paths, lambda: host.config, host.store, keeper.refresh, self._say
        )

    def _report_serving(self, keeper: FrontKeeper) -> None:
        if keeper.is_serving and self._source.is_member():
            self._say(f"serving other nodes on {', '.join(keeper.addresses)}")
        elif keeper.is_serving:
            self._say(f"waiting to be admitted to a cluster on {', '.join(keeper.addresses)}")
        elif not self._source.is_member():
            self._say(
                "this node has no certificate, which `kvmsec node join` begins to get: only this "
                f"host is served, by {self._node.host.paths.node_socket}"
            )

    # The end -----------------------------------------------------------------------------------

    def _handle_signals(self, keeper: FrontKeeper) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._told_to_end.set)
        self._reloading: set[asyncio.Task[None]] = set()

        def reload() -> None:
            task = loop.create_task(self._reload(keeper))
            self._reloading.add(task)
            task.add_done_callback(self._reloading.discard)

        loop.add_signal_handler(signal.SIGHUP, reload)

    async def _reload(self, keeper: FrontKeeper) -> None:
        """Read kvmsec.toml again; what can't be read changes nothing."""
        systemd.notify_reloading()
        try:
            self._node.host.read_settings_again()
            await keeper.refresh()
            self._say("the settings were read again; addresses stay until a restart")
        except (Fault, OSError) as error:
            self._say(f"the settings stay as they were: {error}")
        systemd.notify("READY=1")

    async def _until_the_end(self, *tasks: "asyncio.Task[None]") -> None:
        """Raises what one of the tasks ends with."""
        waiting = asyncio.create_task(self._told_to_end.wait())
        try:
            done, _ = await asyncio.wait((waiting, *tasks), return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            waiting.cancel()

    async def _let_orders_end(self, root_part: RootPart) -> None:
        """What is under way for this host gets time; then it is cancelled, and undone."""
        if root_part.orders_under_way:
            self._say(f"waiting for {root_part.orders_under_way} orders that are under way")
        deadline = time.monotonic() + _ORDERS_END_WITHIN_S
        while root_part.orders_under_way and time.monotonic() < deadline:
            await asyncio.sleep(_LOOK_S)


async def _end(*tasks: "asyncio.Task[None]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
