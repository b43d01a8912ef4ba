"""What an instance leaves behind is gone before its uid has another holder."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from hypervisor.jail import SECCOMP
from tests.attacks.attacker import Answer, Instance, program
from tests.kvm.accelerator import accelerator
from tests.kvm.lab import labs, users
from uidpool.ranges import UidRanges

pytestmark = pytest.mark.kvm

ONE_UID: Final = UidRanges.parse("245000")
WITHOUT_REST: Final = "[uids]\nreuse_delay_s = 0\n"


@pytest.fixture
def lab(features: Path) -> Iterator[Any]:
    with users(), labs(accelerator(), features) as make:
        yield make(WITHOUT_REST, uid_pool=ONE_UID)


@pytest.fixture
def qemu() -> Iterator[str]:
    """The stand-in where nobody else may change it, whatever the checkout lies in."""
    copy = Path("/var/lib/hostile")
    copy.write_bytes(program().read_bytes())
    copy.chmod(0o755)
    yield str(copy)
    copy.unlink()


def order(lab: Any, text: str) -> Answer:
    with Instance(lab.paths.instance("web").serial_socket) as inside:
        return inside.order(text)


@pytest.mark.parametrize(
    ("without", "things"), [(frozenset(), 1), (frozenset({SECCOMP}), 4)], ids=["jail", "no seccomp"]
)
def test_nothing_is_left_for_the_uids_next_holder(
    lab: Any, qemu: str, without: frozenset[str], things: int
) -> None:
    """A set-uid copy; and what the filter keeps it from: a key in each of two keyrings, and memory.

    Message queues it is kept from by its limits.
    """

    def start() -> Any:
        definition = lab.definition(qemu=qemu)
        return lab.run(lambda node: node.start(definition), without_locks=without)

    first = start()
    assert order(lab, "leave-behind /output").found == f"left {things} things"
    assert order(lab, "find-behind /output").found == f"found {things} things"
    lab.stop()
    second = start()
    assert second.uid == first.uid
    assert order(lab, "find-behind /output").word == "NONE"
    lab.stop()
