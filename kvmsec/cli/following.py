"""`instance log`: what was said so far, and what is said from now on.

The instance's own files are read anew every half second, with its process's end waited for in
between. There is no inotify in the standard library, and it would not be better: an instance that
writes without end would wake us at each write, while this costs the same whatever it does.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from kvmsec.cli.output import say, shown_line
from kvmsec.cluster.asking import kind_of
from kvmsec.errors import UnknownInstance
from kvmsec.linux import processes
from kvmsec.linux.errors import Fault

if TYPE_CHECKING:
    from kvmsec.agent import Agent, InstanceLog

_PAUSE_S: Final = 0.5
_SEAM_CHARS: Final = 4096
_UNTRUSTED: Final = "written by the instance, it may have changed it"
_TITLES: Final = {
    "kvmsec": "kvmsec",
    "qemu": f"QEMU ({_UNTRUSTED})",
    "serial": f"serial line ({_UNTRUSTED})",
}


class Transcript:
    """Prints what is new of an instance's words, each source under its heading.

    The instance's lines are indented, so that none of them can pass for a heading or for a line
    of kvmsec's.
    """

    def __init__(self) -> None:
        self._shown = dict.fromkeys(_TITLES, "")
        self._current: str | None = None
        self._is_line_open = False
        self._cut: set[str] = set()

    def show(self, log: InstanceLog, *, is_last: bool = False) -> None:
        """Print what was said since the last time.

        With `is_last`, words that are not the continuation of what was shown are left out: the
        instance's files are being put away.
        """
        for source in _TITLES:
            self._show(source, getattr(log, source), is_last=is_last)

    def end(self) -> None:
        """End the line that is being written."""
        if self._is_line_open and self._current is not None:
            say()
            self._cut.add(self._current)
            self._is_line_open = False

    def _show(self, source: str, text: str, *, is_last: bool) -> None:
        # The rest of a character or of a line's end that is still being written.
        whole = text if is_last else text.rstrip("\r\N{REPLACEMENT CHARACTER}")
        before = self._shown[source]
        new = _continuation(before, whole)
        if whole == before or (is_last and new is None):
            return
        self._shown[source] = whole
        self._head(source)
        self._print(source, f"\n[changed, from its beginning:]\n{whole}" if new is None else new)

    def _head(self, source: str) -> None:
        if self._current == source:
            return
        self.end()
        say(f"== {_TITLES[source]} ==")
        self._current = source

    def _print(self, source: str, text: str) -> None:
        indent = "" if source == "kvmsec" else "  "
        *lines, rest = text.split("\n")
        if lines and source in self._cut and not lines[0].removesuffix("\r"):
            del lines[0]  # the end of a line that was ended for another source's sake
        self._cut.discard(source)
        for line in lines:
            self._begin_line(indent, line)
            say(shown_line(line.removesuffix("\r")))
            self._is_line_open = False
        if rest:
            self._begin_line(indent, rest)
            say(shown_line(rest), is_complete=False)
            self._is_line_open = True

    def _begin_line(self, indent: str, line: str) -> None:
        if not self._is_line_open and line:
            say(indent, is_complete=False)


def _continuation(before: str, whole: str) -> str | None:
    """What came after `before`; None when `whole` does not go on from it.

    The beginning may have gone meanwhile: logs are bounded, and keep their end.
    """
    if whole.startswith(before):
        return whole[len(before) :]
    seam = before[-_SEAM_CHARS:]
    at = whole.rfind(seam)
    return None if at < 0 else whole[at + len(seam) :]


async def show_log(node: Agent, name: str) -> None:
    """Print what was said so far."""
    transcript = Transcript()
    transcript.show(await node.log(name))
    transcript.end()


async def follow_log(node: Agent, name: str) -> None:
    """Print what is said until the instance's process ends; at once when it has none."""
    from kvmsec.node.waiting import readable

    transcript = Transcript()
    pidfd = await _open_process(node, name)
    try:
        transcript.show(await node.log(name))
        while pidfd is not None and not await readable(pidfd, _PAUSE_S):
            transcript.show(await node.log(name))
        transcript.show(await node.log(name), is_last=True)
    finally:
        if pidfd is not None:
            os.close(pidfd)
        transcript.end()


async def _open_process(node: Agent, name: str) -> int | None:
    """A descriptor of the instance's process; None when there is none.

    Asked again after opening: the pid may have become another process's in between.
    """
    pid = await _pid_of(node, name)
    descriptor = None if pid is None else processes.pidfd_of(pid)
    if descriptor is None:
        return None
    if await _pid_of(node, name) == pid:
        return descriptor
    os.close(descriptor)
    return None


async def _pid_of(node: Agent, name: str) -> int | None:
    """None too for one that was stopped and has no definition, of which there is only a log."""
    try:
        return (await node.info(name)).pid
    except Fault as error:
        if kind_of(error) == UnknownInstance.__name__:
            return None
        raise
