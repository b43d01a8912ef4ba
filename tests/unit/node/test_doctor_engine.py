"""What doctor makes of accelerators and packet filters, whatever this host has."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from attrs import evolve

from firewall.errors import BackendUnavailable
from kvmsec.config import Backend, Config
from kvmsec.linux import syscalls
from kvmsec.node.doctor import engine, filters, places
from kvmsec.node.doctor.subject import Subject
from kvmsec.node.host import Host
from kvmsec.node.trial import TrialFailed
from kvmsec.paths import Paths


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    return Subject(Host(Paths(tmp_path)), Config(), cluster=None)


# Accelerators


@pytest.fixture
def no_kvm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(engine, "_KVM", tmp_path / "no kvm")


@pytest.mark.usefixtures("no_kvm")
@pytest.mark.parametrize(
    ("accelerators", "severity"),
    [
        ([], "error"),
        (["kvm"], "error"),
        (["tcg"], "warning"),
        (["tcg", "auto"], "warning"),
        (["tcg", "kvm"], "error"),
    ],
)
def test_without_kvm_it_is_an_error_unless_every_definition_does_without(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, accelerators: list[str], severity: str
) -> None:
    subject.paths.definitions.mkdir(parents=True)
    for number, accelerator in enumerate(accelerators):
        (subject.paths.definitions / f"vm{number}.toml").write_text(accelerator)
    monkeypatch.setattr(
        places,
        "read",
        lambda path: SimpleNamespace(machine=SimpleNamespace(accelerator=path.read_text())),
    )

    (answer,) = engine.check_kvm(subject)

    assert answer.severity == severity
    assert answer.hint and "modprobe" in answer.hint


@pytest.mark.usefixtures("no_kvm")
@pytest.mark.parametrize(
    ("flags", "hint"),
    [
        (b"flags : fpu vmx sse", "modprobe kvm_intel"),
        (b"flags : fpu svm sse", "modprobe kvm_amd"),
        (b"flags : fpu hypervisor", "the hypervisor below"),
        (b"flags : fpu", "the firmware's settings"),
    ],
)
def test_how_to_get_kvm_depends_on_the_processor(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, flags: bytes, hint: str
) -> None:
    monkeypatch.setattr(engine, "read_bounded", lambda path, limit: flags)

    (answer,) = engine.check_kvm(subject)

    assert answer.hint and hint in answer.hint


def test_without_qemu_one_check_says_so_and_the_others_only_that_they_were_not_tried(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert subject.config is not None
    qemu = evolve(subject.config.qemu, path=tmp_path / "no qemu")
    without = evolve(subject, config=evolve(subject.config, qemu=qemu))
    monkeypatch.setattr(engine, "_KVM", tmp_path)

    for check in (engine.check_qemu_files, engine.check_kvm, engine.check_tcg):
        (answer,) = check(without)
        assert answer.severity == "warning"
        assert answer.message.startswith("not tried")

        assert answer.hint


def test_a_kvm_that_runs_no_guest_is_an_error_that_says_what_was_seen(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: object, **__: object) -> float:
        raise TrialFailed("it did not speak within 5 s; QEMU said: KVM internal error")

    qemu = SimpleNamespace(binary=Path("/usr/bin/qemu"), features=with_accelerators("kvm", "tcg"))
    monkeypatch.setattr(engine, "_KVM", tmp_path)
    monkeypatch.setattr(engine, "_find", lambda subject: qemu)
    monkeypatch.setattr(engine, "_trusted_closure", lambda *_: None)
    monkeypatch.setattr(engine, "boot_tiny_guest", fail)

    (kvm,), (tcg,) = engine.check_kvm(subject), engine.check_tcg(subject)

    assert (kvm.severity, tcg.severity) == ("error", "warning")
    assert "KVM internal error" in kvm.message
    assert kvm.hint and tcg.hint


def test_a_qemu_without_kvm_is_an_error_and_one_without_tcg_is_not(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    qemu = SimpleNamespace(binary=Path("/usr/bin/qemu"), features=with_accelerators())
    monkeypatch.setattr(engine, "_KVM", tmp_path)
    monkeypatch.setattr(engine, "_find", lambda subject: qemu)

    (kvm,), (tcg,) = engine.check_kvm(subject), engine.check_tcg(subject)

    assert (kvm.severity, tcg.severity) == ("error", "ok")


def with_accelerators(*names: str) -> SimpleNamespace:
    return SimpleNamespace(accelerators=names)


# Packet filters


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Those that this host is made out to have."""
    present: set[str] = set()

    class Backend:
        def __init__(self, name: str, tag: str) -> None:
            self.name = name

        def require_available(self) -> None:
            if self.name not in present:
                raise BackendUnavailable(self.name, "not in this kernel", hint="modprobe it")

    monkeypatch.setattr(filters, "make_backend", Backend)
    monkeypatch.setattr(syscalls, "unshare", lambda flags: None)
    return present


def with_backend(subject: Subject, setting: Backend) -> Subject:
    assert subject.config is not None
    firewall = evolve(subject.config.firewall, backend=setting)
    return evolve(subject, config=evolve(subject.config, firewall=firewall))


def test_no_packet_filter_at_all_is_an_error_that_names_the_packages(
    subject: Subject, backends: set[str]
) -> None:
    (answer,) = filters.check_backends(subject)

    assert answer.severity == "error"
    assert answer.hint and "iptables" in answer.hint and "nftables" in answer.hint


def test_one_backend_is_enough_and_is_named(subject: Subject, backends: set[str]) -> None:
    backends.add("iptables")

    serving, missing = filters.check_backends(subject)

    assert (serving.severity, missing.severity) == ("ok", "ok")
    assert serving.message.startswith("iptables serves")


def test_a_configured_backend_that_is_missing_is_an_error(
    subject: Subject, backends: set[str]
) -> None:
    backends.add("iptables")

    answer, *_ = filters.check_backends(with_backend(subject, "nftables"))

    assert answer.severity == "error"
    assert answer.hint and "modprobe it" in answer.hint


def test_a_missing_device_is_a_warning_with_its_fix(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(filters, "_TUN", tmp_path / "tun")

    (answer,) = filters.check_tun(subject)

    assert (answer.severity, answer.hint) == ("warning", "modprobe tun")
