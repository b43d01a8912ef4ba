"""Every path below one root, except for what belongs to the kernel."""

import os
import stat
from pathlib import Path

import pytest

from kvmsec.errors import BadName
from kvmsec.linux.errors import UntrustedPath
from kvmsec.paths import Paths


def test_the_default_root_gives_the_documented_places() -> None:
    paths = Paths()
    instance = paths.instance("web1")

    assert paths.config == Path("/etc/kvmsec/kvmsec.toml")
    assert paths.definition("web1") == Path("/etc/kvmsec/instances/web1.toml")
    assert paths.cluster == Path("/var/lib/kvmsec/cluster.json")
    assert paths.key_files == Path("/var/lib/kvmsec")
    assert paths.renewal == Path("/var/lib/kvmsec/renewal.json")
    assert paths.invitations == Path("/var/lib/kvmsec/invitations.json")
    assert paths.node_socket == Path("/run/kvmsec/node.sock")
    assert instance.record == Path("/run/kvmsec/instances/web1/record.json")
    assert instance.qmp_socket == Path("/run/kvmsec/instances/web1/qmp.sock")
    assert paths.instance_log("web1") == Path("/var/log/kvmsec/instances/web1.log")


def test_another_root_moves_every_file_but_not_what_is_the_hosts(tmp_path: Path) -> None:
    paths = Paths(tmp_path)
    instance = paths.instance("web1")

    moved = [
        paths.config,
        paths.definition("web1"),
        paths.cluster,
        paths.key_files,
        paths.renewal,
        paths.invitations,
        paths.node_socket,
        paths.features,
        paths.last_state("web1"),
        instance.record,
        instance.serial_socket,
        instance.output,
        paths.instance_log("web1"),
    ]
    assert all(path.is_relative_to(tmp_path.resolve()) for path in moved)
    assert (paths.uid_leases, paths.uid_state) == (Paths().uid_leases, Paths().uid_state)
    assert paths.image_holdings == Paths().image_holdings == Path("/run/kvmsec/images")
    assert paths.images_lock == Paths().images_lock


def test_each_root_has_a_tag_of_its_own_however_it_is_spelt(tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    (tmp_path / "link").symlink_to(there)

    assert Paths().tag == "kvmsec"
    assert Paths(there).tag == Paths(tmp_path / "link").tag == Paths(there / "../there").tag
    assert Paths(there).tag != Paths(tmp_path).tag
    assert len(Paths(there).tag) == len("kvmsec_") + 8


def test_a_relative_root_does_not_follow_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    paths = Paths(Path("trial"))
    monkeypatch.chdir("/")

    assert paths.root == tmp_path.resolve() / "trial"


@pytest.mark.parametrize(
    "name",
    ["", "../x", "-x", ".x", "a/b", "a\n", "a\0", "A", "a_b", "é", "٣", "a" * 64, "a" * 4096],
)
def test_a_name_that_breaks_the_rule_never_becomes_a_path(name: str) -> None:
    paths = Paths()
    for place in (paths.definition, paths.last_state, paths.instance, paths.instance_log):
        with pytest.raises(BadName) as caught:
            place(name)
        assert caught.value.hint is not None
        assert len(caught.value.message) < 200
        assert "\n" not in caught.value.message


@pytest.mark.parametrize("name", ["a", "0", "web1.example.org", "a-b", "a" * 63, "a..b"])
def test_a_name_within_the_rule_does(name: str) -> None:
    assert Paths().instance(name).directory == Paths().instances / name


@pytest.mark.root
def test_every_directory_is_private_and_a_second_call_changes_nothing(tmp_path: Path) -> None:
    paths = Paths(tmp_path / "root")
    paths.make_directories()
    paths.instance("web1").make()
    paths.make_directories()

    directories = [paths.etc, paths.definitions, paths.var, paths.features, paths.last_states]
    directories += [paths.run, paths.instances, paths.instance("web1").directory]
    directories += [paths.log, paths.instance_logs, paths.uid_leases, paths.uid_state]
    directories += [paths.uid_leases.parent, paths.uid_state.parent, paths.image_holdings]
    for directory in directories:
        status = directory.stat()
        assert (directory, stat.S_IMODE(status.st_mode)) == (directory, 0o700)
        assert status.st_uid == os.geteuid()


def test_a_root_that_others_could_replace_is_refused(tmp_path: Path) -> None:
    above = tmp_path / "shared"
    above.mkdir()
    above.chmod(0o777)

    with pytest.raises(UntrustedPath) as caught:
        Paths(above / "root").make_directories()
    assert caught.value.path == above
    assert not (above / "root").exists()


@pytest.mark.root
def test_a_root_of_another_user_is_refused(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    os.chown(theirs, 240001, 240001)

    with pytest.raises(UntrustedPath, match="belongs to uid 240001"):
        Paths(theirs).make_directories()
