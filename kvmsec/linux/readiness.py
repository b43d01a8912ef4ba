"""Waiting for a descriptor, by poll(2): select(2) takes none above 1023."""

import math
import select


def is_readable(descriptor: int, timeout_s: float) -> bool:
    """Wait at most `timeout_s` seconds until a descriptor is readable, or hung up.

    A pidfd is readable once its process, and every thread of it, has ended.
    """
    return is_ready(descriptor, select.POLLIN, timeout_s)


def is_hung_up(descriptor: int) -> bool:
    """Whether nothing is left to read from a pipe and nobody is there to write any more."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return poll.poll(0) == [(descriptor, select.POLLHUP)]


def has_left(line: int) -> bool:
    """Whether nobody has the other end of a socket any more, whatever is left to read from it."""
    poll = select.poll()
    poll.register(line, 0)
    return bool(poll.poll(0))


def is_ready(descriptor: int, events: int, timeout_s: float) -> bool:
    """Wait at most `timeout_s` seconds for one of the events of poll(2), an error or a hang-up."""
    poll = select.poll()
    poll.register(descriptor, events)
    return bool(poll.poll(max(0, math.ceil(timeout_s * 1000))))
