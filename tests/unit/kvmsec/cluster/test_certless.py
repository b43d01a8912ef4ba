"""The last resort: a common certificate, handed out, carried by hand, and over by itself."""

import asyncio
from datetime import timedelta
from pathlib import Path
from uuid import uuid4

import pytest
from attrs import define, field

from kvmsec.cluster import certless
from kvmsec.cluster.certless import (
    CERTLESS_SERVER_NAME,
    BadBundle,
    BadDuration,
    Handed,
    Way,
    open_bundle,
    pair_to_serve,
    ways_to_call,
)
from kvmsec.errors import NotMaster
from kvmsec.linux.errors import Fault
from kvmsec.pki.certificates import anchors_of, der_of, fingerprint_of
from kvmsec.pki.errors import PeerRefused, PkiError, WrongPassphrase
from kvmsec.pki.judgement import judge_orderer
from kvmsec.pki.pems import Pair
from kvmsec.pki.standing import Trust
from tests.unit.kvmsec.cluster.renewal_world import NOW, Box, FakeNode, World, make_world

PASSPHRASE = "a passphrase that is long"


@define
class Lifeline:
    """A node that is reached as long as it is up, whatever its certificates."""

    box: Box

    @property
    def name(self) -> str:
        return self.box.name

    @property
    def uuid(self):  # type: ignore[no-untyped-def]
        return self.box.member.uuid

    async def put_file(self, name: str, content: str | None) -> None:
        assert name == "certless.pem"
        if not self.box.is_up:
            raise Fault(f"{self.name} does not answer")
        self.box.keys.put("certless.pem", content)


@define
class Scene:
    world: World
    log: list[str] = field(factory=list)

    def nodes(self) -> list[Lifeline]:
        return [Lifeline(box) for box in self.world.boxes.values()]

    def enable(
        self, lasts: timedelta = timedelta(hours=2), passphrase: str | None = None
    ) -> Handed:
        return asyncio.run(
            certless.enable(
                self.world.store,
                self.nodes(),
                self.world.head.member.uuid,
                lasts,
                now=NOW,
                log=self.log.append,
                passphrase=passphrase,
            )
        )

    def disable(self) -> Handed:
        return asyncio.run(
            certless.disable(
                self.world.store, self.nodes(), self.world.head.member.uuid, log=self.log.append
            )
        )

    def common(self, name: str, after: timedelta = timedelta()) -> Pair | None:
        return self.world[name].keys.certless(NOW + after)


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(make_world(tmp_path))


def test_every_node_that_answers_gets_the_pair_and_the_others_are_named(scene: Scene) -> None:
    scene.world["n2"].is_up = False
    handed = scene.enable()

    assert handed.done == ("n0", "n1")
    assert list(handed.missed) == ["n2"]
    assert handed.until == NOW + timedelta(hours=2)
    assert scene.common("n0") == scene.common("n1") != None  # noqa: E711
    assert scene.common("n2") is None
    assert any("n2" in line for line in scene.log)
    assert not any("PRIVATE" in line for line in [*scene.log, repr(handed)])


def test_it_is_never_the_cluster_s_own_key(scene: Scene) -> None:
    scene.enable()
    common = scene.common("n0")
    assert common is not None
    assert common.key_pem != scene.world["n0"].keys.cluster().key_pem
    assert fingerprint_of(common.certificate_pem) != fingerprint_of(
        scene.world["n0"].keys.anchors()
    )


def test_it_ends_by_itself(scene: Scene) -> None:
    scene.enable()
    assert scene.common("n1", timedelta(hours=1, minutes=59)) is not None
    assert scene.common("n1", timedelta(hours=2, seconds=1)) is None


def test_it_is_ended_before_its_time_and_who_keeps_it_is_named(scene: Scene) -> None:
    scene.enable()
    scene.world["n1"].is_up = False
    handed = scene.disable()
    assert set(handed.done) == {"n0", "n2"} and list(handed.missed) == ["n1"]
    assert scene.common("n0") is None and scene.common("n1") is not None


@pytest.mark.parametrize("minutes", [0, 9, 24 * 60 + 1, -5])
def test_a_time_out_of_bounds_is_refused(scene: Scene, minutes: int) -> None:
    with pytest.raises(BadDuration):
        scene.enable(timedelta(minutes=minutes))
    assert scene.common("n0") is None


def test_only_the_master_does_it(scene: Scene) -> None:
    scene.world.master = "n1"
    with pytest.raises(NotMaster):
        scene.enable()


def test_what_is_over_or_broken_is_removed(scene: Scene) -> None:
    scene.enable()
    keys, log = scene.world["n1"].keys, scene.log
    path = keys.directory / "certless.pem"
    assert not certless.remove_expired(keys, NOW + timedelta(hours=1), log.append)
    assert path.exists()
    assert certless.remove_expired(keys, NOW + timedelta(hours=3), log.append)
    assert not path.exists() and "is over" in log[-1]
    assert not certless.remove_expired(keys, NOW, log.append)

    keys.put("certless.pem", scene.world["n0"].keys.own().pem)
    path.write_text("-----BEGIN NOTHING")
    assert certless.remove_expired(keys, NOW, log.append)
    assert not path.exists() and "can't be used" in log[-1]


# Judged ----------------------------------------------------------------------------------------


def trust_of(box: Box, common: Pair | None) -> Trust:
    """What a node trusts whose server.pem and list are lost."""
    assert common is not None
    certificate = common.certificate_pem
    return Trust(
        anchors=anchors_of(certificate),
        members={one.uuid: one.name for one in box.copy.nodes},
        candidates={},
        certless=fingerprint_of(certificate),
    )


def test_a_node_without_any_other_file_takes_an_order_by_it(scene: Scene) -> None:
    scene.enable()
    box, common = scene.world["n1"], scene.common("n1")
    for name in ("client.pem", "server.pem", "ssconf_master_candidates_certs"):
        (box.keys.directory / name).unlink()
    assert common is not None
    der = der_of(common.certificate_pem)
    assert judge_orderer(der, trust_of(box, common), NOW).may_order
    with pytest.raises(PeerRefused, match="validity"):
        judge_orderer(der, trust_of(box, common), NOW + timedelta(hours=3))


def test_a_node_that_lacks_it_is_not_ordered_by_it(scene: Scene) -> None:
    scene.world["n2"].is_up = False
    scene.enable()
    common = scene.common("n0")
    assert common is not None
    with pytest.raises(PeerRefused):
        judge_orderer(der_of(common.certificate_pem), scene.world["n2"].trust(), NOW)


def test_a_pair_before_the_last_one_counts_no_more(scene: Scene) -> None:
    scene.enable()
    earlier = scene.common("n0")
    scene.enable()
    assert earlier is not None
    with pytest.raises(PeerRefused):
        judge_orderer(
            der_of(earlier.certificate_pem),
            trust_of(scene.world["n0"], scene.common("n0")),
            NOW,
        )


OWN = Pair("own certificate", "own key")
COMMON = Pair("common certificate", "common key")


@pytest.mark.parametrize(
    ("own", "common", "ways"),
    [
        (OWN, None, [Way(OWN)]),
        (OWN, COMMON, [Way(OWN), Way(COMMON, CERTLESS_SERVER_NAME)]),
        (None, COMMON, [Way(COMMON, CERTLESS_SERVER_NAME)]),
        (None, None, []),
    ],
)
def test_a_node_calls_as_itself_first(
    own: Pair | None, common: Pair | None, ways: list[Way]
) -> None:
    assert list(ways_to_call(own, common)) == ways


@pytest.mark.parametrize(
    ("own", "common", "asked", "shown"),
    [
        (OWN, None, None, OWN),
        (OWN, None, CERTLESS_SERVER_NAME, OWN),
        (OWN, COMMON, None, OWN),
        (OWN, COMMON, "n1.example", OWN),
        (OWN, COMMON, CERTLESS_SERVER_NAME, COMMON),
        (None, COMMON, None, COMMON),
        (None, None, None, None),
    ],
)
def test_a_node_shows_the_common_one_to_who_asks_or_for_want_of_its_own(
    own: Pair | None, common: Pair | None, asked: str | None, shown: Pair | None
) -> None:
    assert pair_to_serve(own, common, asked) == shown


# Carried by hand -------------------------------------------------------------------------------


def test_what_is_carried_by_hand_is_the_pair_that_the_others_have(scene: Scene) -> None:
    handed = scene.enable(passphrase=PASSPHRASE)
    assert handed.bundle is not None and b"PRIVATE" not in handed.bundle
    cluster = scene.world.state.uuid
    assert open_bundle(handed.bundle, PASSPHRASE, cluster=cluster, now=NOW) == scene.common("n0")
    assert open_bundle(handed.bundle, PASSPHRASE, cluster=None, now=NOW) == scene.common("n0")
    with pytest.raises(WrongPassphrase):
        open_bundle(handed.bundle, "another passphrase", cluster=cluster, now=NOW)
    with pytest.raises(BadBundle, match="is for the cluster"):
        open_bundle(handed.bundle, PASSPHRASE, cluster=uuid4(), now=NOW)
    with pytest.raises(BadBundle, match="valid from"):
        open_bundle(
            handed.bundle, PASSPHRASE, cluster=cluster, now=NOW + timedelta(hours=2, minutes=1)
        )


def test_a_damaged_file_is_refused(scene: Scene) -> None:
    handed = scene.enable(passphrase=PASSPHRASE)
    assert handed.bundle is not None
    another_end = bytes([handed.bundle[-1] ^ 1])
    for broken in (handed.bundle[:-1] + another_end, handed.bundle[:20], b"", b"-----BEGIN"):
        with pytest.raises(PkiError):
            open_bundle(broken, PASSPHRASE, cluster=None, now=NOW)


def test_the_renewal_s_nodes_serve_as_well(scene: Scene) -> None:
    nodes: list[certless.CertlessNode] = [FakeNode(scene.world["n1"], scene.world.head)]
    assert nodes[0].name == "n1"
