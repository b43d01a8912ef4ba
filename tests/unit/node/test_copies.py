"""What a node makes of its copy of the state: who may order, and whether it may draw a uid."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import pytest
from attrs import evolve

from hypervisor.machine import Machine
from kvmsec.errors import StaleCopy
from kvmsec.model.cluster import FORMAT, Cluster, Member, Role, document_of
from kvmsec.model.instance import InstanceDefinition
from kvmsec.model.security import SecurityModel
from kvmsec.node.admission import admit
from kvmsec.node.candidates import write_candidates
from kvmsec.node.host import Host
from kvmsec.paths import Paths
from kvmsec.pki.errors import CANDIDATES_FILE
from uidpool.ranges import EMPTY, UidRanges

ONE = Member("one", uuid=UUID(int=1), address="one", role=Role.CANDIDATE, certificates=("a" * 64,))
TWO = evolve(ONE, name="two", uuid=UUID(int=2), certificates=("b" * 64, "c" * 64))
HERE = Member("here", uuid=UUID(int=3), address="here", certificates=("d" * 64,))
CLUSTER = Cluster(
    name="trial",
    uuid=UUID(int=100),
    uid_pool=UidRanges.parse("246050-246059"),
    draining=EMPTY,
    security_model=None,
    nodes=(ONE, TWO, HERE),
    master=ONE.uuid,
    created_at=datetime(2026, 11, 21, tzinfo=UTC),
)
WEB = InstanceDefinition(machine=Machine(name="web", memory_mib=64, firmware=Path("/x")))


@pytest.fixture
def host(tmp_path: Path) -> Host:
    made = Host(Paths(tmp_path))
    made.paths.var.mkdir(parents=True)
    made.store.introduce(HERE.uuid)
    return made


def put(host: Host, cluster: Cluster, revision: int, *, age_s: float = 0.0) -> None:
    at = datetime.now(UTC) - timedelta(seconds=age_s)
    host.store.put_copy(document_of(cluster), FORMAT, revision, at=at)


def listed(host: Host) -> list[str]:
    return (host.paths.key_files / CANDIDATES_FILE).read_text().split()


def test_the_list_follows_the_state(host: Host) -> None:
    put(host, CLUSTER, 1)
    write_candidates(host.paths, host.store)
    entries = [(ONE, "a"), (TWO, "b"), (TWO, "c")]
    assert listed(host) == [f"{node.uuid}={letter * 64}" for node, letter in entries]

    demoted = evolve(CLUSTER, nodes=(ONE, evolve(TWO, role=Role.PLAIN), HERE))
    put(host, demoted, 2)
    write_candidates(host.paths, host.store)
    assert listed(host) == [f"{ONE.uuid}={'a' * 64}"]


def test_a_node_that_is_being_removed_is_on_no_list(host: Host) -> None:
    put(host, evolve(CLUSTER, nodes=(ONE, evolve(TWO, is_leaving=True), HERE)), 1)
    write_candidates(host.paths, host.store)
    assert listed(host) == [f"{ONE.uuid}={'a' * 64}"]


@pytest.mark.parametrize("content", ["", "garbled", f"{UUID(int=9)}={'e' * 64}\n"])
def test_a_list_that_is_wrong_is_replaced(host: Host, content: str) -> None:
    put(host, CLUSTER, 1)
    (host.paths.key_files / CANDIDATES_FILE).write_text(content)
    write_candidates(host.paths, host.store)
    assert len(listed(host)) == 3


def test_a_cluster_without_certificates_has_no_list(host: Host) -> None:
    put(host, evolve(CLUSTER, nodes=tuple(evolve(n, certificates=()) for n in CLUSTER.nodes)), 1)
    write_candidates(host.paths, host.store)
    assert not (host.paths.key_files / CANDIDATES_FILE).exists()


def test_a_node_draws_from_a_copy_that_was_confirmed_lately(host: Host) -> None:
    put(host, CLUSTER, 1)
    assert admit(host, WEB).model is SecurityModel.POOL


def test_a_node_draws_nothing_from_a_copy_that_was_not(host: Host) -> None:
    put(host, CLUSTER, 1, age_s=host.config.cluster.copy_valid_s + 1)
    with pytest.raises(StaleCopy, match="the master, one, has not confirmed"):
        admit(host, WEB)

    put(host, CLUSTER, 1)  # confirmed again
    assert admit(host, WEB).model is SecurityModel.POOL


def test_other_models_need_no_fresh_copy(host: Host) -> None:
    put(host, CLUSTER, 1, age_s=host.config.cluster.copy_valid_s + 1)
    assert admit(host, evolve(WEB, security_model=SecurityModel.NONE)).model is SecurityModel.NONE
