"""What a process knows of its QEMU is told again, and only as long as nothing of it has changed."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hypervisor import features, identity
from hypervisor.closure import Closure, find_closure
from hypervisor.features import find_qemu
from hypervisor.machine import Machine
from hypervisor.seccomp.library import load_library
from kvmsec.linux import command
from kvmsec.linux.errors import UntrustedPath
from kvmsec.node import engine
from kvmsec.node.engine import Engine, NoKvm, engine_for
from kvmsec.node.host import Host
from kvmsec.paths import Paths

pytestmark = pytest.mark.kvm

Ask = Callable[[], Engine]


@pytest.fixture
def binary() -> Iterator[Path]:
    """A QEMU of its own, in a directory that is root's; it looks for its modules from there."""
    place = Path("/run/kvmsec-engine")
    for directory in (place, place / "bin"):
        directory.mkdir(mode=0o755)
    for name in ("lib", "share"):
        (place / name).symlink_to(f"/usr/{name}")
    shutil.copy(find_qemu(None, None), place / "bin/qemu")
    yield place / "bin/qemu"
    shutil.rmtree(place)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(Paths(tmp_path / "root"))


@pytest.fixture
def ask(host: Host, binary: Path, monkeypatch: pytest.MonkeyPatch) -> Ask:
    """Asks for the engine; known already, as if the files had lain there for long."""
    monkeypatch.setattr(identity, "_SETTLED_NS", -1 << 62)

    def ask() -> Engine:
        return engine_for(host, Machine("vm", qemu=binary, accelerator="tcg"))

    ask()
    return ask


def is_known(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the engine is told with no question, of QEMU or of what is kept on disk."""
    asked = []
    probe = features.probe
    monkeypatch.setattr(engine, "probe", lambda *a, **k: asked.append(a) or probe(*a, **k))
    ask()
    return not asked


def test_what_is_known_is_not_asked_again(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ask()
    assert is_known(ask, monkeypatch)
    assert ask() is first


def test_what_changed_just_now_is_asked_again(
    ask: Ask, host: Host, binary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "_SETTLED_NS", 1 << 62)
    binary.touch()
    ask()
    ask()
    assert not is_known(ask, monkeypatch)


def test_an_edited_qemu_is_asked_again(
    ask: Ask, binary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with binary.open("ab") as file:
        file.write(b"\0")
    assert not is_known(ask, monkeypatch)


def test_a_replaced_qemu_is_asked_again(
    ask: Ask, binary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = binary.stat()
    shutil.copy(binary, binary.with_name("new"))
    binary.with_name("new").rename(binary)
    os.utime(binary, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert not is_known(ask, monkeypatch)


def test_another_library_in_the_place_of_one_is_seen(
    ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    libraries = [Path(source) for source, _ in ask().closure.binds if ".so" in source]
    for library in (libraries[0], libraries[-1], *map(Path, load_library().files)):
        with monkeypatch.context() as meanwhile:
            assert is_known(ask, meanwhile)
        shutil.copy(library, tmp_path / "copy")
        command.run(["mount", "--bind", str(tmp_path / "copy"), str(library)], timeout_s=10)
        try:
            with monkeypatch.context() as meanwhile:
                assert not is_known(ask, meanwhile), library
        finally:
            command.run(["umount", "--lazy", str(library)], timeout_s=10)
        ask()


def test_what_is_known_needs_nothing_of_the_disk(
    ask: Ask, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kept in sorted(host.paths.features.iterdir()):
        kept.unlink()
    assert is_known(ask, monkeypatch)


def test_who_knows_nothing_yet_recalls_the_same_from_the_disk(
    ask: Ask, host: Host, binary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = ask()
    monkeypatch.setattr(features, "_ask", lambda *_: pytest.fail("QEMU was asked"))
    other = Host(host.paths)
    recalled = engine_for(other, Machine("vm", qemu=binary, accelerator="tcg"))
    assert recalled == known
    assert recalled.files == known.files
    assert list(other.engines.values()) == [recalled]


def test_a_qemu_that_is_replaced_while_it_is_asked_is_not_kept(
    host: Host, binary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it can do is the old one's then, and what it needs the new one's."""
    monkeypatch.setattr(identity, "_SETTLED_NS", -1 << 62)
    machine = Machine("vm", qemu=binary, accelerator="tcg")

    def after_a_replacement(*arguments: Any, **options: Any) -> Closure:
        shutil.copy(binary, binary.with_name("new"))
        binary.with_name("new").rename(binary)
        return find_closure(*arguments, **options)

    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(engine, "find_closure", after_a_replacement)
        mixed = engine_for(host, machine)
    assert engine_for(host, machine).features.files != mixed.features.files


def test_a_known_qemu_that_others_may_replace_by_now_is_refused(ask: Ask, binary: Path) -> None:
    binary.parent.chmod(0o777)
    with pytest.raises(UntrustedPath):
        ask()


def test_a_known_qemu_that_is_gone_is_missed(ask: Ask, binary: Path) -> None:
    binary.unlink()
    with pytest.raises(features.QemuNotFound):
        ask()


def test_another_qemu_that_comes_first_by_now_is_taken(
    host: Host, binary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "_FIXED_PATH", str(binary.with_name("first")))
    monkeypatch.setattr(identity, "_SETTLED_NS", -1 << 62)
    machine = Machine("vm", accelerator="tcg")
    usual = find_qemu(None, None)
    assert [engine_for(host, machine).binary for _ in range(3)] == [usual] * 3
    binary.rename(binary.with_name("first"))
    assert engine_for(host, machine).binary == binary.with_name("first")


def test_kvm_that_is_gone_is_missed(
    host: Host, binary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "_SETTLED_NS", -1 << 62)
    for accelerator in ("kvm", "auto"):
        machine = Machine("vm", qemu=binary, accelerator=accelerator)
        assert [engine_for(host, machine).accelerator for _ in range(3)] == ["kvm"] * 3
    monkeypatch.setattr(engine, "_KVM", tmp_path / "missing")
    assert engine_for(host, machine).accelerator == "tcg"
    with pytest.raises(NoKvm):
        engine_for(host, Machine("vm", qemu=binary, accelerator="kvm"))


def test_a_qemu_that_runs_without_a_filter_is_not_kept(
    host: Host, binary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "_SETTLED_NS", -1 << 62)
    monkeypatch.setattr(engine, "_filter_for", lambda host: None)
    machine = Machine("vm", qemu=binary, accelerator="tcg")
    assert [engine_for(host, machine).system_calls for _ in range(3)] == [None] * 3
    monkeypatch.undo()
    assert engine_for(host, machine).system_calls is not None
