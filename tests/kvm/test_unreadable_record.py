"""A record that nobody can read stands for an instance that may run: nothing it may need goes."""

from typing import Any

import pytest

from kvmsec.agent import InstanceState
from kvmsec.errors import InstancesRun
from kvmsec.node.records import RecordUnreadable

pytestmark = pytest.mark.kvm

USER: dict[str, Any] = {"security_model": "user", "security_domain": "guestkeeper"}


@pytest.mark.parametrize("spoilt", [b"{", b'{"format": 99}'])
def test_what_an_unreadable_record_may_stand_for_stays_guarded(lab, spoilt):
    disk = lab.disk()
    started = lab.start("web", disks=[{"path": str(disk)}], **USER)
    path = lab.paths.instance("web").record
    good = path.read_bytes()
    path.write_bytes(spoilt if spoilt == b"{" else good.replace(b'"format":1', b'"format":99'))

    try:
        assert lab.instances()["web"].state is InstanceState.UNKNOWN
        with pytest.raises(RecordUnreadable):
            lab.run(lambda node: node.remove_rules())
        with pytest.raises(RecordUnreadable):
            lab.start("db", disks=[{"path": str(disk)}])
        # A start and a stop of somebody else's take nothing from it.
        lab.start("mail", **USER)
        lab.stop("mail")
        assert str(started.uid) in lab.rules()
    finally:
        path.write_bytes(good)

    with pytest.raises(InstancesRun):
        lab.run(lambda node: node.remove_rules())
    lab.stop("web")
    assert str(started.uid) not in lab.rules()
