"""The key files in a renewal: swapped so that none is ever half, wherever it is killed."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmsec.pki.certificates import (
    Pair,
    anchors_of,
    fingerprint_of,
)
from kvmsec.pki.errors import BadPem, KeyFileRefused
from kvmsec.pki.files import KeyFiles
from kvmsec.pki.keys import KeyKind, kind_of, load_key
from tests.unit.kvmsec.pki.authorities import UUIDS, Town
from tests.unit.kvmsec.pki.key_file_steps import (
    content_of,
    is_renewing,
    prepare,
    require_usable,
    sign,
)
from tests.unit.kvmsec.pki.killing import killed_everywhere

ALPHA = UUIDS["alpha"]


def _renew(files: KeyFiles, old: Pair, new: Pair) -> None:
    request = prepare(files, old.certificate_pem + new.certificate_pem)
    files.commit(sign(new, request))
    files.finish(new.certificate_pem)


def test_a_renewal_ends_with_the_new_pair_alone(files: KeyFiles, town: Town, new: Pair) -> None:
    before = files.own()
    _renew(files, town.cluster, new)

    assert sorted(content_of(files)) == ["client.pem", "server.pem"]
    assert files.anchors() == new.certificate_pem
    assert files.own().certificate_pem != before.certificate_pem
    assert files.own().key_pem != before.key_pem
    assert not is_renewing(files)
    require_usable(files)


def test_each_step_may_be_told_twice(files: KeyFiles, town: Town, new: Pair) -> None:
    both = town.cluster.certificate_pem + new.certificate_pem
    first, second = (prepare(files, both) for _ in range(2))
    certificate = sign(new, second)
    files.commit(certificate)
    assert files.own().key_pem
    files.commit(certificate)
    assert is_renewing(files)
    for _ in range(2):
        files.finish(new.certificate_pem)
    require_usable(files)
    assert _public(first) == _public(second)


def _public(request: str) -> object:
    from cryptography import x509

    return x509.load_pem_x509_csr(request.encode()).public_key()


@pytest.mark.parametrize("until", ["prepare", "commit"])
def test_a_rollback_leaves_all_as_it_was(
    until: str, files: KeyFiles, town: Town, new: Pair
) -> None:
    before = content_of(files)
    request = prepare(files, town.cluster.certificate_pem + new.certificate_pem)
    if until == "commit":
        files.commit(sign(new, request))
    for _ in range(2):
        files.rollback()
        assert content_of(files) == before


def test_anchors_alone_can_change_without_a_new_key(files: KeyFiles, town: Town, new: Pair) -> None:
    both = town.cluster.certificate_pem + new.certificate_pem
    assert files.prepare(both, False, node_name="alpha", node_uuid=ALPHA) is None
    assert files.own() == town.pairs["alpha"]
    assert files.anchors() == both
    with pytest.raises(KeyFileRefused, match="is missing"):
        files.commit(sign(town.cluster, _request_of_another()))


def _request_of_another() -> str:
    from kvmsec.pki.certificates import make_request

    return make_request("alpha", ALPHA).request_pem


def test_a_step_that_would_cut_the_node_off_changes_nothing(
    files: KeyFiles, town: Town, new: Pair
) -> None:
    before = content_of(files)
    for step in (
        lambda: prepare(files, new.certificate_pem),
        lambda: prepare(files, "words"),
        lambda: files.finish(new.certificate_pem),
        lambda: files.finish(""),
    ):
        with pytest.raises(BadPem):
            step()
        assert content_of(files) == before

    request = prepare(files, town.cluster.certificate_pem)
    prepared = content_of(files)
    for certificate in (
        sign(new, request),
        sign(town.cluster, _request_of_another()),
        town.cluster.certificate_pem,
        "words",
    ):
        with pytest.raises(BadPem):
            files.commit(certificate)
        assert content_of(files) == prepared
    with pytest.raises(BadPem):
        files.finish(new.certificate_pem)
    assert is_renewing(files)


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
        request = prepare(files, town.cluster.certificate_pem)
        files.commit(sign(town.cluster, request))
        files.finish(town.cluster.certificate_pem)
        require_usable(files)


def test_a_renewal_may_change_the_kind_of_key(files: KeyFiles, town: Town) -> None:
    prepare(files, town.cluster.certificate_pem)
    request = prepare(files, town.cluster.certificate_pem, KeyKind.P256)
    files.commit(sign(town.cluster, request))
    assert kind_of(load_key(files.own().key_pem).public_key()) is KeyKind.P256


def test_what_an_unfinished_renewal_kept_is_not_brought_back_by_the_next(
    files: KeyFiles, town: Town, new: Pair
) -> None:
    both = town.cluster.certificate_pem + new.certificate_pem
    files.commit(sign(new, prepare(files, both)))
    renewed = files.own()
    # Nobody has told this node of the end; the others have dropped the old anchor.
    prepare(files, new.certificate_pem)
    files.rollback()
    assert files.own() == renewed
    require_usable(files)


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
        require_usable(files)
        _renew(files, town.cluster, new)
        assert sorted(content_of(files)) == ["client.pem", "server.pem"]
        assert files.anchors() == new.certificate_pem
        require_usable(files)
    require_usable(files)
    assert kills >= 12


def test_a_renewal_that_is_killed_before_its_end_rolls_back(
    files: KeyFiles, town: Town, new: Pair, tmp_path: Path
) -> None:
    before = content_of(files)

    def begin() -> None:
        request = prepare(files, town.cluster.certificate_pem + new.certificate_pem)
        files.commit(sign(new, request))

    reset = _keep(files, tmp_path)
    kills = 0
    for _ in killed_everywhere(begin, reset):
        kills += 1
        require_usable(files)
        files.rollback()
        assert content_of(files) == before
    assert kills >= 8


def test_a_rollback_that_is_killed_anywhere_goes_on(
    files: KeyFiles, town: Town, new: Pair, tmp_path: Path
) -> None:
    before = content_of(files)
    files.commit(sign(new, prepare(files, town.cluster.certificate_pem + new.certificate_pem)))
    reset = _keep(files, tmp_path)
    kills = 0
    for _ in killed_everywhere(files.rollback, reset):
        kills += 1
        require_usable(files)
        files.rollback()
        assert content_of(files) == before
    assert kills >= 6


def test_a_commit_that_is_killed_anywhere_takes_the_same_certificate_again(
    files: KeyFiles, town: Town, tmp_path: Path
) -> None:
    certificate = sign(town.cluster, prepare(files, town.cluster.certificate_pem))
    reset = _keep(files, tmp_path)
    kills = 0
    for _ in killed_everywhere(lambda: files.commit(certificate), reset):
        kills += 1
        require_usable(files)
        files.commit(certificate)
        assert files.own().certificate_pem == certificate
        require_usable(files)
    assert kills >= 4


@pytest.mark.parametrize("then", ["finish", "rollback"])
def test_an_end_that_is_killed_anywhere_brings_no_old_pair_back(
    then: str, files: KeyFiles, town: Town, new: Pair, tmp_path: Path
) -> None:
    files.commit(sign(new, prepare(files, town.cluster.certificate_pem + new.certificate_pem)))
    renewed = fingerprint_of(files.own().certificate_pem)
    reset = _keep(files, tmp_path)
    kills = 0
    for _ in killed_everywhere(lambda: files.finish(new.certificate_pem), reset):
        kills += 1
        require_usable(files)
        has_dropped_the_old = files.anchors() == new.certificate_pem
        if then == "finish":
            files.finish(new.certificate_pem)
            has_dropped_the_old = True
        files.rollback()
        require_usable(files)
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
            require_usable(files)
        install()
        require_usable(files)
        assert _no_half_file_is_left(files)
