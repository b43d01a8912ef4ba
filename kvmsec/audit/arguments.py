"""QEMU's argument list, read for what bears on confinement (pure; qemu(1)).

No value of a secret leaves this module.
"""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from hypervisor.foreign_text import escaped
from kvmsec.audit.facts import Arguments

_NAME_CHARS: Final = 64
_OPTION_CHARS: Final = 32
_SHOWN: Final = 16
_FLAG: Final = ("", "on", "off", "yes", "no", "true", "false")
_SECRET_KEYS: Final = ("password", "passwd", "passphrase", "cookie", "chap-secret")
# user:password@ in a URL; `%` separates them in iSCSI's (qemu-block-drivers(7)).
_URL_PASSWORD: Final = re.compile(r"[a-z][a-z0-9+.-]*://[^/@\s:%]+[:%][^/@\s]+@", re.ASCII)
_JSON_IMAGE: Final = re.compile(r"(?:^|=)json:(?=\{)", re.ASCII)
_RBD_KEY: Final = re.compile(r"^rbd:.*:key=", re.ASCII)
_APPENDED: Final = re.compile(r"(?:^|[\s._-])(?:password|passwd|passphrase|token)=\S", re.ASCII)
_CREDENTIAL: Final = "io.systemd.credential"
_TCP: Final = re.compile(r"^(?:tcp|telnet|websocket|tn3270|udp):", re.ASCII)
_MONITORS: Final = ("qmp", "qmp-pretty", "monitor", "serial", "gdb", "incoming")

DENIALS: Final = ("obsolete", "elevateprivileges", "spawn", "resourcecontrol")
"""What -sandbox can be told to deny beside its own list (qemu(1))."""


def parse_cmdline(raw: bytes) -> list[str]:
    """The arguments in /proc/PID/cmdline; bytes that aren't UTF-8 stay as surrogates."""
    return raw.decode(errors="surrogateescape").rstrip("\0").split("\0")


def read_arguments(argv: Sequence[str]) -> Arguments:
    """What an argument list says of the machine's confinement."""
    options = list(_options(argv))
    return Arguments(
        name=_name(options),
        sandbox=_sandbox(options),
        secrets=_shown(_secrets(options)),
        exposed=_shown(_exposed(options)),
        hides_memory_from_cores=any(
            _fields(value).get("dump-guest-core") == "off" for _, value in options
        ),
    )


def _options(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each option with what follows it; which take a value doesn't matter here.

    What follows no option is a disk image, by the option "".
    """
    is_after_option = False
    for index, word in enumerate(argv[1:], 1):
        if word.startswith("-") and len(word) > 1:
            following = argv[index + 1] if index + 1 < len(argv) else ""
            yield word.lstrip("-"), "" if following.startswith("-") else following
            is_after_option = True
        else:
            if not is_after_option:
                yield "", word
            is_after_option = False


def _fields(value: str) -> dict[str, str]:
    """`a,b=c` as {"a": "", "b": "c"}; JSON's tables one level per dot. A doubled comma is one."""
    if value.startswith("{"):
        try:
            document = json.loads(value)
        except (ValueError, RecursionError):
            return {}
        return dict(_flat(document, "", 0)) if isinstance(document, dict) else {}
    found: dict[str, str] = {}
    for part in re.split(r"(?<!,),(?!,)", value):
        key, _, text = part.partition("=")
        found.setdefault(key, text)
    return found


def _documents(value: str) -> Iterator[dict[str, str]]:
    """JSON that stands for an image within a value, `file=json:{...}`; there a comma is doubled."""
    for match in _JSON_IMAGE.finditer(value):
        for text in (value[match.end() :], value[match.end() :].replace(",,", ",")):
            with contextlib.suppress(ValueError, RecursionError):
                document, _ = json.JSONDecoder().raw_decode(text)
                yield dict(_flat(document, "", 0))
                break


def _keys(value: str) -> set[str]:
    return set(_fields(value))


def _flat(table: Mapping[str, Any], above: str, depth: int) -> Iterator[tuple[str, str]]:
    for key, value in table.items():
        if isinstance(value, dict) and depth < 8:
            yield from _flat(value, f"{above}{key}.", depth + 1)
        else:
            yield f"{above}{key}", str(value)


def _name(options: Sequence[tuple[str, str]]) -> str | None:
    for option, value in options:
        if option == "name" and value:
            fields = _fields(value)
            name = fields.get("guest") or next(iter(fields), "")
            return escaped(name.replace(",,", ","), limit_chars=_NAME_CHARS) or None
    return None


def _sandbox(options: Sequence[tuple[str, str]]) -> dict[str, str] | None:
    for option, value in reversed(options):
        if option == "sandbox":
            fields = _fields(value)
            switch = fields.get("enable") or next(iter(fields), "")
            if switch != "on":
                return None
            return {name: escaped(fields.get(name, ""), limit_chars=16) for name in DENIALS}
    return None


# Secrets -------------------------------------------------------------------------------------


def _secrets(options: Sequence[tuple[str, str]]) -> Iterator[str]:
    for option, value in options:
        if what := _secret_in(option, value):
            yield f"{f'-{option}' if option else 'a disk image'} ({what})"


def _secret_in(option: str, value: str) -> str | None:
    """What a value holds that nobody but QEMU should know; None for nothing."""
    if option == "append":
        return "a password or token for the kernel" if _APPENDED.search(value) else None
    if option in ("smbios", "fw_cfg") and _CREDENTIAL in value:
        return "a systemd credential"
    fields = _fields(value)
    kind = fields.get("qom-type") or next(iter(fields), "")
    if option == "object" and kind == "secret":
        # With a keyid it is encrypted by another secret.
        return "data" if fields.get("data") and not fields.get("keyid") else None
    for table in (fields, *_documents(value)):
        for key, text in table.items():
            if key.rpartition(".")[2] in _SECRET_KEYS and text.lower() not in _FLAG:
                return key if len(key) <= 32 else "a password"
    # Commas may stand in a URL: looked for in the whole value.
    return "a URL with a password" if _URL_PASSWORD.search(value) or _holds_rbd_key(value) else None


def _holds_rbd_key(value: str) -> bool:
    return any(_RBD_KEY.search(text) for text in (value, value.partition("=")[2]))


# Listeners -----------------------------------------------------------------------------------


def _exposed(options: Sequence[tuple[str, str]]) -> Iterator[str]:
    for option, value in options:
        if option == "s" or (option in _MONITORS and _TCP.search(value)):
            yield f"-{option}"
        elif option == "vnc" and value not in ("", "none") and not value.startswith("unix:"):
            kind = _fields(value)
            has_password = "password-secret" in kind or kind.get("password", "off") in ("on", "")
            yield f"-vnc ({'with' if has_password else 'without'} a password)"
        elif option == "spice" and ({"port", "tls-port"} & _keys(value)):
            yield f"-spice{' (without a password)' if 'disable-ticketing' in value else ''}"
        elif option == "chardev" and {"host", "port", "addr.data.host"} & _keys(value):
            yield "-chardev socket"


def _shown(found: Iterator[str]) -> tuple[str, ...]:
    unique = dict.fromkeys(escaped(text, limit_chars=_OPTION_CHARS * 2) for text in found)
    return tuple(unique)[:_SHOWN]
