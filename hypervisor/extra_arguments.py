"""The arguments that a node's configuration may add to every QEMU, and no others.

None of them opens a file or a socket, runs a program, adds a path to the host or takes a part of
the confinement away; whatever else QEMU offers is refused.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from hypervisor.errors import ForbiddenArguments, Problem

_SWITCH: Final = re.compile(r"on|off")
_NUMBER: Final = re.compile(r"[0-9]{1,9}|0x[0-9a-f]{1,8}")
_WORD: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9 .:_+-]{0,63}")
_UUID: Final = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")

_KEYED: Final[Mapping[str, Mapping[str, re.Pattern[str]]]] = {
    "boot": {
        "order": re.compile(r"[a-p]{1,16}"),
        "once": re.compile(r"[a-p]{1,16}"),
        "menu": _SWITCH,
        "strict": _SWITCH,
        "reboot-timeout": re.compile(r"-1|[0-9]{1,5}"),
    },
    "rtc": {
        "base": re.compile(r"utc|localtime|\d{4}-\d\d-\d\d(T\d\d:\d\d:\d\d)?", re.ASCII),
        "clock": re.compile(r"host|rt|vm"),
        "driftfix": re.compile(r"none|slew"),
    },
    "overcommit": {"mem-lock": _SWITCH, "cpu-pm": _SWITCH},
    "action": {
        "reboot": re.compile(r"reset|shutdown"),
        "panic": re.compile(r"pause|shutdown|exit-failure|none"),
        "watchdog": re.compile(r"reset|shutdown|poweroff|inject-nmi|pause|none"),
    },
    "smbios": {
        "type": re.compile(r"[01234]|11|17"),
        "uuid": _UUID,
        **dict.fromkeys(
            ("manufacturer", "product", "version", "serial", "sku", "family", "vendor"), _WORD
        ),
        **dict.fromkeys(("asset", "location", "value"), _WORD),
        "date": re.compile(r"[0-9/]{1,10}"),
        "release": re.compile(r"\d{1,3}\.\d{1,3}", re.ASCII),
    },
    "global": {
        "kvm-pit.lost_tick_policy": re.compile(r"delay|discard"),
        "PIIX4_PM.disable_s3": re.compile(r"[01]"),
        "PIIX4_PM.disable_s4": re.compile(r"[01]"),
        "ICH9-LPC.disable_s3": re.compile(r"[01]"),
        "ICH9-LPC.disable_s4": re.compile(r"[01]"),
    },
}
_DEVICES: Final[Mapping[str, Mapping[str, re.Pattern[str]]]] = {
    "i6300esb": {},
    "isa-debug-exit": {"iobase": _NUMBER, "iosize": _NUMBER},
    "pvpanic": {"ioport": _NUMBER},
    "virtio-balloon-pci": {"deflate-on-oom": _SWITCH, "free-page-reporting": _SWITCH},
    "virtio-rng-pci": {"max-bytes": _NUMBER, "period": _NUMBER},
}
_PLAIN: Final = {"uuid": _UUID}
_BARE: Final = ("no-reboot",)
ALLOWED: Final = tuple(sorted(f"-{name}" for name in (*_KEYED, "device", *_PLAIN, *_BARE)))


def check_extra_arguments(arguments: Sequence[str]) -> tuple[str, ...]:
    """Return the configured extra arguments, each option with one dash, or refuse them.

    Raises ForbiddenArguments with every argument that isn't allowed, and why.
    """
    rest = list(arguments)
    checked: list[str] = []
    problems: list[Problem] = []
    while rest:
        written = rest.pop(0)
        name = written.removeprefix("-").removeprefix("-") if written.startswith("-") else ""
        if name in _BARE:
            checked.append(f"-{name}")
        elif name not in _KEYED and name not in _PLAIN and name != "device":
            problems.append(Problem(ascii(written), f"is not one of {', '.join(ALLOWED)}"))
            _drop_value(rest)
        elif not rest:
            problems.append(Problem(ascii(written), "lacks its value"))
        else:
            value = rest.pop(0)
            checked += (f"-{name}", value)
            problems += (Problem(f"-{name} {value!a}", what) for what in _faults(name, value))
    if problems:
        raise ForbiddenArguments(problems)
    return tuple(checked)


def _drop_value(rest: list[str]) -> None:
    """Leave out what belongs to a refused option, so that it isn't reported a second time."""
    if rest and not rest[0].startswith("-"):
        rest.pop(0)


def _faults(name: str, value: str) -> Iterator[str]:
    if name in _PLAIN:
        if not _PLAIN[name].fullmatch(value):
            yield "has a value that can't be read"
    elif name == "device":
        model, _, properties = value.partition(",")
        if model in _DEVICES:
            yield from _pair_faults(_DEVICES[model], properties.split(",") if properties else [])
        else:
            yield f"names a device other than {', '.join(_DEVICES)}"
    else:
        yield from _pair_faults(_KEYED[name], value.split(","))


def _pair_faults(known: Mapping[str, re.Pattern[str]], pairs: Sequence[str]) -> Iterator[str]:
    # A doubled comma, QEMU's way to write one in a value, leaves an empty part: refused with it.
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or key not in known:
            yield f"has {pair!a}, where only {', '.join(known) or 'nothing'} may stand"
        elif not known[key].fullmatch(value):
            yield f"has a value for {key} that is not allowed"
