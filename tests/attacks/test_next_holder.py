"""What an instance leaves behind is gone before its uid has another holder."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

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


def test_nothing_is_left_for_the_uids_next_holder(lab: Any, qemu: str) -> None:
    first = lab.start(qemu=qemu)
    assert order(lab, "leave-behind /output").word == "succeeded"
    found = order(lab, "find-behind /output")
    assert found.word == "succeeded", "what would be left can be found"
    lab.stop()
    second = lab.start(qemu=qemu)
    assert second.uid == first.uid
    assert order(lab, "find-behind /output").word == "NONE"
    lab.stop()
