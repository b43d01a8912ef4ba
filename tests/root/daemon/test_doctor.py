"""What `doctor` makes of a member's key files and of the user that its front runs as."""

import asyncio
import json
import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from kvmsec.agent import Finding
from kvmsec.daemon.doctor import CHECKS
from kvmsec.model.cluster import Role
from kvmsec.node.doctor import examine
from kvmsec.node.host import Host
from kvmsec.paths import Paths
from kvmsec.pki.certificates import make_cluster_pair, make_request, sign_request
from kvmsec.pki.errors import CANDIDATES_FILE
from kvmsec.pki.pems import Pair
from kvmsec.rpc import messages as m
from tests.root.daemon.cluster_of_two import ClusterOfTwo, Daemon
from tests.root.daemon.node_by_command import Node
from tests.root.daemon.test_command_line import run

pytestmark = pytest.mark.root

KEY_FILES = ("client.pem", "server.pem", CANDIDATES_FILE)


def found(cluster: ClusterOfTwo, code: str) -> list[Finding]:
    findings = asyncio.run(examine(Host(cluster.paths), CHECKS))
    return [one for one in findings if one.code == code]


def the_problem(cluster: ClusterOfTwo) -> Finding:
    (one,) = found(cluster, "key-files")
    assert one.severity == "error"
    assert one.hint
    return one


def install_ended(cluster: ClusterOfTwo) -> None:
    long_ago = datetime.now(UTC) - timedelta(days=9999)
    signer = make_cluster_pair("site", cluster.uuid, now=long_ago)
    member = cluster.here.member
    request = make_request(member.name, member.uuid)
    certificate = sign_request(
        signer, request.request_pem, node_name=member.name, node_uuid=member.uuid, now=long_ago
    )
    cluster.files.install(signer.certificate_pem, Pair(certificate, request.key_pem))


@pytest.fixture
def member(cluster: ClusterOfTwo) -> ClusterOfTwo:
    cluster.join()
    return cluster


def test_whole_key_files_are_fine(member: ClusterOfTwo) -> None:
    assert [one.severity for one in found(member, "key-files")] == ["ok"]


@pytest.mark.parametrize("name", KEY_FILES)
def test_a_key_file_that_is_gone_is_named(member: ClusterOfTwo, name: str) -> None:
    (member.paths.key_files / name).unlink()
    assert name in the_problem(member).message


@pytest.mark.parametrize("name", KEY_FILES)
def test_a_key_file_that_others_may_read_is_named(member: ClusterOfTwo, name: str) -> None:
    (member.paths.key_files / name).chmod(0o644)
    problem = the_problem(member)
    assert name in problem.message
    assert "mode 0644" in problem.message


@pytest.mark.parametrize("name", KEY_FILES)
def test_a_key_file_of_somebody_elses_is_named(member: ClusterOfTwo, name: str) -> None:
    os.chown(member.paths.key_files / name, 247001, 247001)
    assert "belongs to uid 247001" in the_problem(member).message


@pytest.mark.parametrize("name", KEY_FILES)
def test_a_link_in_place_of_a_key_file_is_not_followed(member: ClusterOfTwo, name: str) -> None:
    path = member.paths.key_files / name
    path.rename(path.with_suffix(".moved"))
    path.symlink_to(path.with_suffix(".moved"))
    assert "is a symbolic link" in the_problem(member).message


@pytest.mark.parametrize("name", KEY_FILES)
def test_a_key_file_that_is_no_such_thing_is_named(member: ClusterOfTwo, name: str) -> None:
    (member.paths.key_files / name).write_text("garbage\n")
    assert name in the_problem(member).message


def test_a_key_of_another_certificate_is_seen(member: ClusterOfTwo) -> None:
    mixed = Pair(member.here.pair.certificate_pem, member.other.pair.key_pem)
    (member.paths.key_files / "client.pem").write_text(mixed.pem)
    assert "client.pem" in the_problem(member).message


def test_a_certificate_of_another_cluster_is_seen(member: ClusterOfTwo) -> None:
    foreign = make_cluster_pair("elsewhere", member.uuid, now=datetime.now(UTC))
    stranger = member.make("here", Role.PLAIN, signed_by=foreign)
    (member.paths.key_files / "client.pem").write_text(stranger.pair.pem)
    assert "does not go with server.pem" in the_problem(member).message


def test_certificates_that_have_ended_are_seen(member: ClusterOfTwo) -> None:
    install_ended(member)
    problems = found(member, "key-files")
    assert [one.severity for one in problems] == ["error", "error"]
    assert [one.message.split(" has ended")[0] for one in problems] == ["server.pem", "client.pem"]


def test_a_front_without_its_user_is_an_error_that_makes_it(member: ClusterOfTwo) -> None:
    member.paths.etc.mkdir(parents=True, exist_ok=True)
    member.paths.config.write_text('[node]\nfront_user = "kvmsec-nobody-has-it"\n')
    (one,) = found(member, "front-user")
    assert one.severity == "error"
    assert "useradd --system" in (one.hint or "")


def test_a_node_alone_can_do_without_a_daemon_and_is_warned(nodes: Callable[[], Node]) -> None:
    node = nodes()
    node.do("cluster", "init", "--name", "site")
    paths = Paths(node.root)
    paths.etc.mkdir(parents=True, exist_ok=True)
    paths.config.write_text('[node]\nfront_user = "kvmsec-nobody-has-it"\n')
    findings = asyncio.run(examine(Host(paths), CHECKS))
    assert [(one.code, one.severity) for one in findings] == [
        ("front-user", "warning"),
        ("key-files", "ok"),
    ]


def test_a_front_with_its_user_is_fine(member: ClusterOfTwo, front_user: str) -> None:
    assert [one.severity for one in found(member, "front-user")] == ["ok"]


def told(cluster: ClusterOfTwo) -> dict[str, Any]:
    status, out, _ = run(cluster.root, "doctor", "--json")
    assert status in (0, 3)
    return {one["code"]: one["severity"] for one in json.loads(out)}


def test_doctor_says_so_with_a_daemon_without_and_to_others(
    cluster: ClusterOfTwo, daemon: Daemon
) -> None:
    others = {one.code: one.severity for one in cluster.ask("node.doctor", m.Nothing()).findings}
    by_daemon = told(cluster)
    daemon.end()
    alone = told(cluster)

    for one in (others, by_daemon, alone):  # What else this host has may change meanwhile.
        assert (one["front-user"], one["key-files"]) == ("ok", "ok")
        assert one.keys() == alone.keys()


def test_a_node_of_no_cluster_needs_neither(cluster: ClusterOfTwo) -> None:
    assert {"front-user", "key-files"}.isdisjoint(told(cluster))
