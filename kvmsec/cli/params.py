"""What is written on the command line, parsed at the door into what is meant."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import click

from kvmsec.cli.failures import WrongValue
from kvmsec.linux.errors import Fault

# int() takes "1_000" and digits of every script: what is written must be what a person reads.
_WHOLE: Final = re.compile(r"[0-9]{1,18}", re.ASCII)
_SCORE: Final = re.compile(r"[0-9]{1,2}(\.[0-9]{1,2})?", re.ASCII)
_SECONDS: Final = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?", re.ASCII)


class _Parsed(click.ParamType):  # type: ignore[type-arg]  # not generic in click 8.1
    """A parameter that a plain function parses; a Fault of it is wrong usage."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):  # a default, parsed already
            return value
        try:
            return self._parse(value)
        except Fault as fault:
            wrong = WrongValue(fault)
        except ValueError as error:
            wrong = WrongValue(Fault(str(error)))
        wrong.ctx, wrong.param = ctx, param
        raise wrong


def _pool(text: str) -> Any:
    from uidpool.ranges import UidRanges

    return UidRanges.parse(text)


def _whole_number(text: str) -> int:
    if not _WHOLE.fullmatch(text):
        raise ValueError(f"{_short(text)} is not a whole number")
    return int(text)


def _percent(text: str) -> int:
    """With the sign, as systemd has it, or without."""
    return _whole_number(text.removesuffix("%"))


def _seconds(text: str) -> float:
    if not _SECONDS.fullmatch(text):
        raise ValueError(f"{_short(text)} is not a number of seconds such as 30 or 2.5")
    return float(text)


def _score(text: str) -> float:
    if not _SCORE.fullmatch(text) or float(text) > 10:
        raise ValueError(f"{_short(text)} is not a score from 0.0 to 10.0")
    return float(text)


def _path(text: str) -> Path:
    if not text:
        raise ValueError("a path can't be empty")
    path = Path(text)
    return path if path.is_absolute() else Path.cwd() / path


def _instance_name(text: str) -> str:
    from kvmsec.model.names import require_name

    return require_name("an instance", text)


def _cluster_name(text: str) -> str:
    from kvmsec.model.names import require_name

    return require_name("a cluster", text)


def _node_name(text: str) -> str:
    from kvmsec.model.names import require_name

    return require_name("a node", text)


def _endpoint(text: str) -> Any:
    from kvmsec.model.endpoints import parse_endpoint

    return parse_endpoint(text)


def _bind(text: str) -> str:
    """What the daemon takes: the text, once it is known to be one."""
    from kvmsec.model.addresses import parse_bind

    parse_bind(text)
    return text


def _disk(text: str) -> dict[str, object]:
    from hypervisor.spec import disk_from_option

    return disk_from_option(text, folder=Path.cwd())


def _nic(text: str) -> dict[str, object]:
    from hypervisor.spec import nic_from_option

    return nic_from_option(text)


def _short(text: str) -> str:
    return ascii(text) if len(text) <= 40 else f"{text[:40]!a}…"


POOL: Final = _Parsed("pool", _pool)
WHOLE_NUMBER: Final = _Parsed("number", _whole_number)
SCORE: Final = _Parsed("score", _score)
PERCENT: Final = _Parsed("percent", _percent)
SECONDS: Final = _Parsed("seconds", _seconds)
PATH: Final = _Parsed("path", _path)
INSTANCE_NAME: Final = _Parsed("name", _instance_name)
CLUSTER_NAME: Final = _Parsed("name", _cluster_name)
NODE_NAME: Final = _Parsed("name", _node_name)
ENDPOINT: Final = _Parsed("endpoint", _endpoint)
BIND: Final = _Parsed("address", _bind)
DISK: Final = _Parsed("disk", _disk)
NIC: Final = _Parsed("nic", _nic)

SECURITY_MODEL: Final = click.Choice(["none", "user", "pool"])

json_option = click.option(
    "--json", "as_json", is_flag=True, help="One JSON document, for machines."
)
