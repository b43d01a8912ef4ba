"""The key files: read when nobody else could have, and put in place whole."""

import os
import stat
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from kvmsec.errors import NotRoot
from kvmsec.pki.certificates import (
    Pair,
)
from kvmsec.pki.errors import BadCandidates, BadPem, KeyFileRefused
from kvmsec.pki.files import KeyFiles
from tests.unit.kvmsec.pki.authorities import NOW, UUIDS, Town
from tests.unit.kvmsec.pki.key_file_steps import (
    READERS,
    common_pair,
    content_of,
    prepare,
)

ALPHA = UUIDS["alpha"]


def test_every_file_is_its_owners_alone(files: KeyFiles, town: Town) -> None:
    before = os.umask(0)
    try:
        files.put("server.key", town.cluster.key_pem)
        files.put("certless.pem", common_pair().pem)
        files.write_candidates(town.trust().candidates)
        prepare(files, town.cluster.certificate_pem)
    finally:
        os.umask(before)
    paths = list(files.directory.iterdir())
    assert len(paths) == 6
    assert {stat.S_IMODE(path.stat().st_mode) for path in paths} == {0o600}


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
    before = content_of(files)
    for content in ("", "words", town.cluster.key_pem[:-40], mixed):
        if name == "server.key" and content == mixed:
            continue
        with pytest.raises(BadPem):
            files.put(name, content)  # type: ignore[arg-type]
    assert content_of(files) == before


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
    common = common_pair()
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
    prepare(full, town.cluster.certificate_pem)
    (full.directory / "renewal.json").write_text("keys of a renewal")
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
