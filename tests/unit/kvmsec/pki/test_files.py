"""The key files: read when nobody else could have, and swapped so that none is ever half."""

import os
import shutil
import stat
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from kvmsec.errors import NotRoot
from kvmsec.pki.certificates import (
    Pair,
    anchors_of,
    fingerprint_of,
    make_certless_pair,
    require_whole,
    sign_request,
)
from kvmsec.pki.chain import anchor_of
from kvmsec.pki.contexts import client_context, server_context
from kvmsec.pki.errors import BadCandidates, BadPem, KeyFileRefused
from kvmsec.pki.files import KeyFiles
from kvmsec.pki.keys import KeyKind, kind_of, load_key
from tests.unit.kvmsec.pki.authorities import NOW, UUIDS, Town, load_certificate, make_cluster
from tests.unit.kvmsec.pki.killing import killed_everywhere

ALPHA = UUIDS["alpha"]


@pytest.fixture(scope="module")
def town() -> Town:
    return Town()


@pytest.fixture(scope="module")
def new() -> Pair:
    return make_cluster()


@pytest.fixture
def files(tmp_path: Path, town: Town) -> KeyFiles:
    directory = tmp_path / "var"
    directory.mkdir(mode=0o700)
    files = KeyFiles(directory)
    files.install(town.cluster.certificate_pem, town.pairs["alpha"])
    return files


def _prepare(files: KeyFiles, anchors: str, kind: KeyKind = KeyKind.ED25519) -> str:
    request = files.prepare(anchors, node_name="alpha", node_uuid=ALPHA, kind=kind)
    assert request is not None
    return request


def _sign(cluster: Pair, request: str) -> str:
    return sign_request(cluster, request, node_name="alpha", node_uuid=ALPHA, now=NOW)


def _content(files: KeyFiles) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(files.directory.iterdir())}


def _require_usable(files: KeyFiles) -> None:
    """What holds at any moment: the pair is whole, and this node's own anchors have signed it."""
    own = require_whole(files.own())
    anchor_of(load_certificate(own.certificate_pem), files.anchors_der())
    server_context(own, files.anchors())
    client_context(own, files.anchors())


def test_every_file_is_its_owners_alone(files: KeyFiles, town: Town) -> None:
    before = os.umask(0)
    try:
        files.put("server.key", town.cluster.key_pem)
        files.put("certless.pem", _common().pem)
        files.write_candidates(town.trust().candidates)
        _prepare(files, town.cluster.certificate_pem)
    finally:
        os.umask(before)
    paths = list(files.directory.iterdir())
    assert len(paths) == 6
    assert {stat.S_IMODE(path.stat().st_mode) for path in paths} == {0o600}


def _common() -> Pair:
    return make_certless_pair("prod", now=NOW, lifetime=timedelta(hours=2))


def test_what_was_put_is_read_back(files: KeyFiles, town: Town) -> None:
    assert files.own() == town.pairs["alpha"]
    assert files.anchors() == town.cluster.certificate_pem
    assert not files.holds_cluster_key()
    files.put("server.key", town.cluster.key_pem)
    assert files.holds_cluster_key()
    assert files.cluster() == town.cluster
    files.write_candidates(town.trust().candidates)
    assert files.candidates() == town.trust().candidates
    files.put("server.key", None)
    files.put("server.key", None)
    assert not files.holds_cluster_key()


READERS: list[tuple[str, Callable[[KeyFiles], object]]] = [
    ("server.pem", KeyFiles.anchors),
    ("client.pem", KeyFiles.own),
    ("server.key", KeyFiles.cluster),
    ("certless.pem", lambda files: files.certless(NOW)),
    ("ssconf_master_candidates_certs", KeyFiles.candidates),
]


@pytest.fixture
def full(files: KeyFiles, town: Town) -> KeyFiles:
    files.put("server.key", town.cluster.key_pem)
    files.put("certless.pem", _common().pem)
    files.write_candidates(town.trust().candidates)
    for _, read in READERS:
        read(files)
    return files


def _to_symlink(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def _to_dangling_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/nowhere")


def _to_hard_link(path: Path) -> None:
    os.link(path, path.with_name("elsewhere"))


def _to_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _to_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


def _to_readable(path: Path) -> None:
    path.chmod(0o640)


def _to_writable(path: Path) -> None:
    path.chmod(0o602)


def _to_huge(path: Path) -> None:
    path.write_text(path.read_text() + "\n" * (2 << 20))


def _to_bytes(path: Path) -> None:
    path.write_bytes(b"\xff\xfe")


def _to_open_directory(path: Path) -> None:
    path.parent.chmod(0o770)


CHANGES = [
    *(_to_symlink, _to_dangling_link, _to_hard_link, _to_directory, _to_fifo),
    *(_to_readable, _to_writable, _to_huge, _to_bytes, _to_open_directory),
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(("name", "read"), READERS, ids=[name for name, _ in READERS])
def test_a_file_that_others_could_reach_is_refused(
    name: str,
    read: Callable[[KeyFiles], object],
    change: Callable[[Path], None],
    full: KeyFiles,
) -> None:
    change(full.directory / name)
    with pytest.raises((KeyFileRefused, BadCandidates)) as caught:
        read(full)
    assert str(full.directory) in caught.value.message
    assert caught.value.hint


@pytest.mark.root
@pytest.mark.parametrize(("name", "read"), READERS, ids=[name for name, _ in READERS])
def test_a_file_of_another_user_is_refused(
    name: str, read: Callable[[KeyFiles], object], full: KeyFiles
) -> None:
    os.chown(full.directory / name, 246090, 0)
    with pytest.raises((KeyFileRefused, BadCandidates), match="246090"):
        read(full)


@pytest.mark.parametrize(("name", "read"), READERS, ids=[name for name, _ in READERS])
def test_a_file_that_is_missing_or_broken_is_told_by_its_name(
    name: str, read: Callable[[KeyFiles], object], full: KeyFiles
) -> None:
    path = full.directory / name
    for content in ("", "words", path.read_text()[:-50]):
        path.write_text(content)
        with pytest.raises((BadPem, BadCandidates)) as caught:
            read(full)
        assert name in caught.value.message
        assert caught.value.hint
    path.unlink()
    if name == "certless.pem":
        assert read(full) is None
        return
    with pytest.raises((KeyFileRefused, BadCandidates), match="is missing") as missing:
        read(full)
    assert name in missing.value.message


def test_no_list_means_that_nobody_may_order(files: KeyFiles) -> None:
    with pytest.raises(BadCandidates) as caught:
        files.candidates()
    assert "ssconf_master_candidates_certs" in caught.value.message
    assert "ssconf_master_candidate_certs" in caught.value.message
    with pytest.raises(BadCandidates):
        files.write_candidates({})


def test_a_write_replaces_a_link_and_does_not_follow_it(
    files: KeyFiles, town: Town, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.write_text("as it was")
    path = files.directory / "server.key"
    path.symlink_to(outside)
    files.put("server.key", town.cluster.key_pem)

    assert outside.read_text() == "as it was"
    assert not path.is_symlink()


@pytest.mark.parametrize("name", ["server.pem", "server.key", "certless.pem"])
def test_what_could_not_be_used_is_not_put(name: str, files: KeyFiles, town: Town) -> None:
    mixed = Pair(town.pairs["alpha"].certificate_pem, town.pairs["beta"].key_pem).pem
    before = _content(files)
    for content in ("", "words", town.cluster.key_pem[:-40], mixed):
        if name == "server.key" and content == mixed:
            continue
        with pytest.raises(BadPem):
            files.put(name, content)  # type: ignore[arg-type]
    assert _content(files) == before


@pytest.mark.parametrize("name", ["client.pem", "../x", "/etc/shadow", "cluster.json", ""])
def test_no_other_file_is_handed_out(name: str, files: KeyFiles) -> None:
    for content in (None, "words"):
        with pytest.raises(ValueError, match="no file"):
            files.put(name, content)  # type: ignore[arg-type]


def test_a_cluster_key_without_its_certificate_is_told_as_such(
    files: KeyFiles, new: Pair, town: Town
) -> None:
    files.put("server.key", new.key_pem)
    with pytest.raises(BadPem, match="belongs to no certificate"):
        files.cluster()
    files.put("server.pem", town.cluster.certificate_pem + new.certificate_pem)
    assert files.cluster() == new


def test_the_common_pair_counts_while_it_lasts_and_beside_broken_files(
    files: KeyFiles, town: Town
) -> None:
    assert files.usable_certless(NOW) is None
    common = _common()
    files.put("certless.pem", common.pem)
    assert files.usable_certless(NOW) == common
    assert files.usable_certless(NOW + timedelta(hours=3)) is None

    assert files.beside_certless() == (town.pairs["alpha"], town.cluster.certificate_pem)
    (files.directory / "server.pem").write_text("broken")
    (files.directory / "client.pem").unlink()
    assert files.beside_certless() == (None, "")


def test_a_broken_common_pair_counts_as_none(files: KeyFiles) -> None:
    (files.directory / "certless.pem").write_text("broken")
    (files.directory / "certless.pem").chmod(0o600)
    assert files.usable_certless(NOW) is None


def test_leaving_forgets_every_file(full: KeyFiles, town: Town) -> None:
    _prepare(full, town.cluster.certificate_pem)
    full.keep_next_cluster(town.cluster)
    (full.directory / ".client.pem.0123456789abcdef").write_text("a key")
    assert full.is_member()
    full.remove_all()
    full.remove_all()
    assert list(full.directory.iterdir()) == []
    assert not full.is_member()


def test_a_nodes_files_are_read_by_root_alone(
    files: KeyFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(NotRoot):
        files.own()


# A renewal -----------------------------------------------------------------------------------


def _renew(files: KeyFiles, old: Pair, new: Pair) -> None:
    request = _prepare(files, old.certificate_pem + new.certificate_pem)
    files.commit(_sign(new, request))
    files.finish(new.certificate_pem)


def test_a_renewal_ends_with_the_new_pair_alone(files: KeyFiles, town: Town, new: Pair) -> None:
    before = files.own()
    _renew(files, town.cluster, new)

    assert sorted(_content(files)) == ["client.pem", "server.pem"]
    assert files.anchors() == new.certificate_pem
    assert files.own().certificate_pem != before.certificate_pem
    assert files.own().key_pem != before.key_pem
    assert not files.is_renewing()
    _require_usable(files)


def test_each_step_may_be_told_twice(files: KeyFiles, town: Town, new: Pair) -> None:
    both = town.cluster.certificate_pem + new.certificate_pem
    first, second = (_prepare(files, both) for _ in range(2))
    certificate = _sign(new, second)
    files.commit(certificate)
    assert files.own().key_pem
    files.commit(certificate)
    assert files.is_renewing()
    for _ in range(2):
        files.finish(new.certificate_pem)
    _require_usable(files)
    assert _public(first) == _public(second)


def _public(request: str) -> object:
    from cryptography import x509

    return x509.load_pem_x509_csr(request.encode()).public_key()


@pytest.mark.parametrize("until", ["prepare", "commit"])
def test_a_rollback_leaves_all_as_it_was(
    until: str, files: KeyFiles, town: Town, new: Pair
) -> None:
    before = _content(files)
    request = _prepare(files, town.cluster.certificate_pem + new.certificate_pem)
    if until == "commit":
        files.commit(_sign(new, request))
    for _ in range(2):
        files.rollback()
        assert _content(files) == before


def test_anchors_alone_can_change_without_a_new_key(files: KeyFiles, town: Town, new: Pair) -> None:
    both = town.cluster.certificate_pem + new.certificate_pem
    assert files.prepare(both, False, node_name="alpha", node_uuid=ALPHA) is None
    assert files.own() == town.pairs["alpha"]
    assert files.anchors() == both
    with pytest.raises(KeyFileRefused, match="is missing"):
        files.commit(_sign(town.cluster, _request_of_another()))


def _request_of_another() -> str:
    from kvmsec.pki.certificates import make_request

    return make_request("alpha", ALPHA).request_pem


def test_a_step_that_would_cut_the_node_off_changes_nothing(
    files: KeyFiles, town: Town, new: Pair
) -> None:
    before = _content(files)
    for step in (
        lambda: _prepare(files, new.certificate_pem),
        lambda: _prepare(files, "words"),
        lambda: files.finish(new.certificate_pem),
        lambda: files.finish(""),
    ):
        with pytest.raises(BadPem):
            step()
        assert _content(files) == before

    request = _prepare(files, town.cluster.certificate_pem)
    prepared = _content(files)
    for certificate in (
        _sign(new, request),
        _sign(town.cluster, _request_of_another()),
        town.cluster.certificate_pem,
        "words",
    ):
        with pytest.raises(BadPem):
            files.commit(certificate)
        assert _content(files) == prepared
    with pytest.raises(BadPem):
        files.finish(new.certificate_pem)
    assert files.is_renewing()


def test_a_renewal_mends_a_node_whose_pair_is_missing_broken_or_foreign(
    files: KeyFiles, town: Town, new: Pair
) -> None:
    path = files.directory / "client.pem"
    foreign = Town(new).pairs["alpha"].pem
    for content in (None, "", "words", foreign):
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_text(content)
            path.chmod(0o600)
        request = _prepare(files, town.cluster.certificate_pem)
        files.commit(_sign(town.cluster, request))
        files.finish(town.cluster.certificate_pem)
        _require_usable(files)


def test_a_renewal_may_change_the_kind_of_key(files: KeyFiles, town: Town) -> None:
    _prepare(files, town.cluster.certificate_pem)
    request = _prepare(files, town.cluster.certificate_pem, KeyKind.P256)
    files.commit(_sign(town.cluster, request))
    assert kind_of(load_key(files.own().key_pem).public_key()) is KeyKind.P256


def test_what_an_unfinished_renewal_kept_is_not_brought_back_by_the_next(
    files: KeyFiles, town: Town, new: Pair
) -> None:
    both = town.cluster.certificate_pem + new.certificate_pem
    files.commit(_sign(new, _prepare(files, both)))
    renewed = files.own()
    # Nobody has told this node of the end; the others have dropped the old anchor.
    _prepare(files, new.certificate_pem)
    files.rollback()
    assert files.own() == renewed
    _require_usable(files)


# Killed anywhere -----------------------------------------------------------------------------


def _keep(files: KeyFiles, tmp_path: Path) -> Callable[[], None]:
    """Keeps the directory as it is now, and puts it back when called."""
    kept = tmp_path / "kept"
    shutil.copytree(files.directory, kept)

    def reset() -> None:
        shutil.rmtree(files.directory)
        shutil.copytree(kept, files.directory)

    return reset


def _no_half_file_is_left(files: KeyFiles) -> bool:
    return not [path for path in files.directory.iterdir() if path.name.startswith(".")]


def test_a_renewal_that_is_killed_anywhere_goes_on(
    files: KeyFiles, town: Town, new: Pair, tmp_path: Path
) -> None:
    reset = _keep(files, tmp_path)
    kills = 0
    for _ in killed_everywhere(lambda: _renew(files, town.cluster, new), reset):
        kills += 1
        _require_usable(files)
        _renew(files, town.cluster, new)
        assert sorted(_content(files)) == ["client.pem", "server.pem"]
        assert files.anchors() == new.certificate_pem
        _require_usable(files)
    _require_usable(files)
    assert kills >= 12


def test_a_renewal_that_is_killed_before_its_end_rolls_back(
    files: KeyFiles, town: Town, new: Pair, tmp_path: Path
) -> None:
    before = _content(files)

    def begin() -> None:
        request = _prepare(files, town.cluster.certificate_pem + new.certificate_pem)
        files.commit(_sign(new, request))

    reset = _keep(files, tmp_path)
    kills = 0
    for _ in killed_everywhere(begin, reset):
        kills += 1
        _require_usable(files)
        files.rollback()
        assert _content(files) == before
    assert kills >= 8


def test_a_rollback_that_is_killed_anywhere_goes_on(
    files: KeyFiles, town: Town, new: Pair, tmp_path: Path
) -> None:
    before = _content(files)
    files.commit(_sign(new, _prepare(files, town.cluster.certificate_pem + new.certificate_pem)))
    reset = _keep(files, tmp_path)
    kills = 0
    for _ in killed_everywhere(files.rollback, reset):
        kills += 1
        _require_usable(files)
        files.rollback()
        assert _content(files) == before
    assert kills >= 6


def test_a_commit_that_is_killed_anywhere_takes_the_same_certificate_again(
    files: KeyFiles, town: Town, tmp_path: Path
) -> None:
    certificate = _sign(town.cluster, _prepare(files, town.cluster.certificate_pem))
    reset = _keep(files, tmp_path)
    kills = 0
    for _ in killed_everywhere(lambda: files.commit(certificate), reset):
        kills += 1
        _require_usable(files)
        files.commit(certificate)
        assert files.own().certificate_pem == certificate
        _require_usable(files)
    assert kills >= 4


@pytest.mark.parametrize("then", ["finish", "rollback"])
def test_an_end_that_is_killed_anywhere_brings_no_old_pair_back(
    then: str, files: KeyFiles, town: Town, new: Pair, tmp_path: Path
) -> None:
    files.commit(_sign(new, _prepare(files, town.cluster.certificate_pem + new.certificate_pem)))
    renewed = fingerprint_of(files.own().certificate_pem)
    reset = _keep(files, tmp_path)
    kills = 0
    for _ in killed_everywhere(lambda: files.finish(new.certificate_pem), reset):
        kills += 1
        _require_usable(files)
        has_dropped_the_old = files.anchors() == new.certificate_pem
        if then == "finish":
            files.finish(new.certificate_pem)
            has_dropped_the_old = True
        files.rollback()
        _require_usable(files)
        assert _no_half_file_is_left(files)
        if has_dropped_the_old:
            assert fingerprint_of(files.own().certificate_pem) == renewed
            assert files.anchors_der() == anchors_of(new.certificate_pem)
    assert kills >= 4


def test_a_join_that_is_killed_anywhere_leaves_no_half_member(tmp_path: Path, town: Town) -> None:
    directory = tmp_path / "var"
    directory.mkdir(mode=0o700)
    files = KeyFiles(directory)

    def install() -> None:
        files.install(town.cluster.certificate_pem, town.pairs["alpha"])

    for _ in killed_everywhere(install, _keep(files, tmp_path)):
        if files.is_member():
            _require_usable(files)
        install()
        _require_usable(files)
        assert _no_half_file_is_left(files)


def test_the_clusters_next_pair_is_kept_apart(files: KeyFiles, town: Town, new: Pair) -> None:
    assert files.next_cluster() is None
    files.keep_next_cluster(new)
    assert files.next_cluster() == new
    with pytest.raises(BadPem):
        files.keep_next_cluster(Pair(new.certificate_pem, town.cluster.key_pem))
    files.forget_next_cluster()
    assert files.next_cluster() is None
