"""What is served with and who is trusted while the last resort lasts, whatever else is broken."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from kvmsec.daemon.front_messages import TrustMessage
from kvmsec.daemon.told import trust_of
from kvmsec.daemon.trust_source import TrustSource
from kvmsec.model.cluster import Cluster, Member, Role
from kvmsec.paths import Paths
from kvmsec.pki.certificates import (
    Pair,
    anchors_of,
    fingerprint_of,
    make_certless_pair,
    make_cluster_pair,
    make_request,
    sign_request,
)
from kvmsec.pki.errors import KeyFileRefused
from kvmsec.pki.files import KeyFiles
from kvmsec.store.file import FileStore
from uidpool.ranges import EMPTY

NOW = datetime(2026, 5, 4, 12, tzinfo=UTC)
NEXT = datetime(2026, 5, 4, 15, tzinfo=UTC)
HERE = uuid4()
SITE = UUID(int=1)


def pair_of(anchor: Pair) -> Pair:
    request = make_request("here", HERE)
    signed = sign_request(anchor, request.request_pem, node_name="here", node_uuid=HERE, now=NOW)
    return Pair(signed, request.key_pem)


class Files:
    """A candidate's files, with the common pair beside them."""

    def __init__(self, directory: Path) -> None:
        directory.chmod(0o700)
        self.paths = Paths(directory)
        self.paths.var.mkdir(parents=True, mode=0o700)
        self.anchor = make_cluster_pair("site", SITE, now=NOW)
        self.own = pair_of(self.anchor)
        self.common = make_certless_pair("site", now=NOW, lifetime=timedelta(hours=2))
        self.keys = KeyFiles(self.paths.key_files)
        self.keys.install(self.anchor.certificate_pem, self.own)
        self.keys.put("certless.pem", self.common.pem)
        self.fingerprint = fingerprint_of(self.own.certificate_pem)
        self.keys.write_candidates({HERE: frozenset({self.fingerprint})})
        member = Member(
            "here",
            uuid=HERE,
            address="192.0.2.1",
            role=Role.CANDIDATE,
            certificates=(self.fingerprint,),
        )
        cluster = Cluster(
            name="site",
            uuid=SITE,
            uid_pool=EMPTY,
            draining=EMPTY,
            security_model=None,
            nodes=(member,),
            master=HERE,
            created_at=NOW,
        )
        FileStore(self.paths.cluster).save(cluster, 0)

    def spoil(self, name: str) -> None:
        (self.paths.key_files / name).write_text("broken")

    def source(self, now: datetime = NOW) -> TrustSource:
        return TrustSource(self.paths, FileStore(self.paths.cluster), lambda: now)

    def message(self, now: datetime = NOW) -> TrustMessage:
        message = self.source(now).message()
        assert message is not None
        return message


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def test_a_node_serves_its_own_pair_and_the_common_one_by_name(files: Files) -> None:
    told = files.message()
    assert (told.pair, told.common) == (files.own.pem, files.common.pem)
    assert told.certless == fingerprint_of(files.common.certificate_pem)
    assert told.anchors == files.anchor.certificate_pem + files.common.certificate_pem
    assert told.candidates == {HERE: (files.fingerprint,)}


@pytest.mark.parametrize("lost", ["client.pem", "server.pem", "cluster.json"])
def test_whatever_is_broken_the_common_pair_is_trusted(files: Files, lost: str) -> None:
    files.spoil(lost)
    told, standing = files.message(), files.source().standing()
    assert told.common == files.common.pem
    assert told.pair == (files.common.pem if lost == "client.pem" else files.own.pem)
    trust = trust_of(told)
    assert trust is not None and standing is not None
    assert trust.certless == standing.certless == told.certless
    assert trust.anchors == (() if lost == "server.pem" else anchors_of(files.keys.anchors()))


def test_the_last_resort_works_during_a_renewal(files: Files) -> None:
    """Three certificates for TLS; those of the cluster alone are anchors of nodes."""
    other = make_cluster_pair("site", SITE, now=NOW)
    both = files.anchor.certificate_pem + other.certificate_pem
    files.keys.prepare(both, node_name="here", node_uuid=HERE)
    told = files.message()
    assert told.anchors == both + files.common.certificate_pem
    trust = trust_of(told)
    assert trust is not None and trust.anchors == anchors_of(both)


def test_after_its_end_nothing_is_left_of_it(files: Files) -> None:
    told, standing = files.message(NEXT), files.source(NEXT).standing()
    assert (told.pair, told.common, told.certless) == (files.own.pem, None, None)
    assert told.anchors == files.anchor.certificate_pem
    assert standing is not None and standing.certless is None


def test_a_broken_common_pair_counts_as_none(files: Files) -> None:
    files.spoil("certless.pem")
    told, standing = files.message(), files.source().standing()
    assert (told.pair, told.common, told.certless) == (files.own.pem, None, None)
    assert standing is not None
    assert standing.candidates == {HERE: frozenset({files.fingerprint})}


def test_beside_a_broken_common_pair_a_lost_own_one_is_named(files: Files) -> None:
    files.spoil("certless.pem")
    (files.paths.key_files / "client.pem").unlink()
    with pytest.raises(KeyFileRefused, match=r"client\.pem"):
        files.source().message()
