"""`cluster renew-crypto` and `certless`, as typed: over a cluster of this one node, real files."""

import json
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import click
import pytest
from click.testing import CliRunner, Result

from kvmsec.cli.certless import cluster_certless, node_certless
from kvmsec.cli.renew_crypto import renew_crypto
from kvmsec.cli.session import Session
from kvmsec.cluster.certless import CERTLESS_FILE
from kvmsec.model.cluster import Cluster, Member, Role
from kvmsec.paths import Paths
from kvmsec.pki.certificates import (
    fingerprint_of,
    make_cluster_pair,
    make_request,
    sign_request,
)
from kvmsec.pki.errors import SealBroken
from kvmsec.pki.files import KeyFiles
from kvmsec.pki.pems import Pair
from kvmsec.store.file import FileStore
from uidpool.ranges import EMPTY


class Here(Session):
    """A session of this user, without a node: renewals and the last resort need none."""

    def require_root(self) -> None:
        pass

    def run(self, action: Callable[[Any], Any]) -> Any:
        import asyncio

        return asyncio.run(action(None))


@pytest.fixture
def session(tmp_path: Path) -> Here:
    paths = Paths(tmp_path)
    for directory in (paths.var, paths.log):
        directory.mkdir(parents=True, mode=0o700)
    now, name, uuid, cluster_uuid = datetime.now(UTC), "n0", uuid4(), uuid4()
    anchor = make_cluster_pair("trial", cluster_uuid, now=now)
    request = make_request(name, uuid)
    certificate = sign_request(anchor, request.request_pem, node_name=name, node_uuid=uuid, now=now)
    fingerprint = fingerprint_of(certificate)
    keys = KeyFiles(paths.key_files)
    keys.install(anchor.certificate_pem, Pair(certificate, request.key_pem))
    keys.put("server.key", anchor.key_pem)
    keys.write_candidates({uuid: frozenset({fingerprint})})
    member = Member(
        name, uuid=uuid, address="192.0.2.1", role=Role.CANDIDATE, certificates=(fingerprint,)
    )
    cluster = Cluster(
        name="trial",
        uuid=cluster_uuid,
        uid_pool=EMPTY,
        draining=EMPTY,
        security_model=None,
        nodes=(member,),
        master=uuid,
        created_at=now,
    )
    FileStore(paths.cluster).save(cluster, 0)
    return Here(tmp_path, is_debug=True)


def run(session: Here, command: click.Command, *arguments: str, stdin: str = "") -> Result:
    return CliRunner().invoke(command, arguments, obj=session, input=stdin)


def keys_of(session: Here) -> KeyFiles:
    return KeyFiles(session.paths.key_files)


def test_a_renewal_is_previewed_and_done(session: Here) -> None:
    before = keys_of(session).anchors()
    told = run(session, renew_crypto, "--new-cluster-certificate", "--dry-run", "--json")
    assert [one["node"] for one in json.loads(told.stdout)] == ["n0"]
    assert keys_of(session).anchors() == before
    assert not session.paths.renewal.exists()

    done = run(session, renew_crypto, "--new-cluster-certificate", "--key-kind", "p256")
    assert (done.exit_code, done.stdout) == (0, "the new certificates are in force\n")
    assert keys_of(session).anchors() != before
    assert not session.paths.renewal.exists()


def test_going_on_with_nothing_says_so(session: Here) -> None:
    done = run(session, renew_crypto)
    assert (done.exit_code, done.stdout) == (0, "no renewal is under way; nothing was done\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--new-cluster-certificate", "--node", "n0"),
        ("--new-node-certificates", "--abort"),
        ("--abort", "--forget-offline"),
        ("--abort", "--dry-run"),
        ("--key-kind", "p256"),
        ("--key-kind", "dsa", "--new-node-certificates"),
    ],
)
def test_what_can_t_be_meant_is_wrong_usage(session: Here, arguments: tuple[str, ...]) -> None:
    assert run(session, renew_crypto, *arguments).exit_code == 2


def test_the_last_resort_is_handed_out_carried_shown_and_ended(
    session: Here, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    done = run(session, cluster_certless, "enable", "--for", "2h", "--bundle", str(bundle))
    assert done.exit_code == 0, done.output
    (line,) = [one for one in done.stderr.splitlines() if one.startswith("passphrase")]
    passphrase = line.rpartition(" ")[2]
    assert passphrase not in done.stdout
    assert os.stat(bundle).st_mode & 0o777 == 0o600
    common = keys_of(session).certless(datetime.now(UTC))
    assert common is not None
    shown = json.loads(run(session, cluster_certless, "show", "--json").stdout)
    assert shown["certless"] and shown["fingerprint"] == fingerprint_of(common.certificate_pem)

    ended = run(session, cluster_certless, "disable")
    assert (ended.exit_code, ended.stdout) == (0, "1 node runs with client certificates again\n")
    assert not (session.paths.key_files / CERTLESS_FILE).exists()
    assert not json.loads(run(session, cluster_certless, "show", "--json").stdout)["certless"]

    assert run(session, node_certless, str(bundle), stdin="wrong, and long enough\n").exception
    assert keys_of(session).certless(datetime.now(UTC)) is None
    installed = run(session, node_certless, str(bundle), stdin=f"{passphrase}\n")
    assert installed.exit_code == 0, installed.output
    assert keys_of(session).certless(datetime.now(UTC)) == common

    log = (session.paths.log / "cluster.log").read_text()
    assert "without client certificates until" in log and "by hand" in log
    assert passphrase not in log and "PRIVATE" not in log


@pytest.mark.parametrize("what", ["nothing-there", "."])
def test_a_bundle_that_cant_be_read_is_named_with_who_writes_one(
    session: Here, tmp_path: Path, what: str
) -> None:
    error = run(session, node_certless, str(tmp_path / what)).exception
    assert isinstance(error, SealBroken)
    assert str(tmp_path / what) in error.message
    assert "kvmsec cluster certless enable" in (error.hint or "")


@pytest.mark.parametrize("span", ["2", "0h", "9m", "25h", "1d", "-2h", "2hours", ""])
def test_a_span_out_of_bounds_is_refused(session: Here, span: str) -> None:
    done = run(session, cluster_certless, "enable", "--for", span)
    assert done.exit_code != 0
    assert not (session.paths.key_files / CERTLESS_FILE).exists()
