"""What a daemon does for certificates by itself: a common pair that is over goes."""

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from kvmsec.config import Config
from kvmsec.daemon.certificates_kept import CertificatesKept
from kvmsec.errors import NoCluster
from kvmsec.paths import Paths
from kvmsec.pki.certificates import make_certless_pair
from kvmsec.pki.files import KeyFiles
from kvmsec.store.file import FileStore


class Trial:
    def __init__(self, directory: Path) -> None:
        directory.chmod(0o700)
        self.paths = Paths(directory)
        for path in (self.paths.var, self.paths.log):
            path.mkdir(parents=True, mode=0o700)
        self.keys = KeyFiles(self.paths.key_files)
        self.certless = self.paths.key_files / "certless.pem"
        self.store = FileStore(self.paths.cluster)
        self.said: list[str] = []
        self.kept = CertificatesKept(self.paths, Config, self.store, self.refresh, self.said.append)

    async def refresh(self) -> None:
        """There is no front here."""

    def put(self, made: datetime) -> None:
        pair = make_certless_pair("site", now=made, lifetime=timedelta(hours=2))
        self.keys.put("certless.pem", pair.pem)

    def look(self) -> None:
        asyncio.run(self.kept.look())


@pytest.fixture
def trial(tmp_path: Path) -> Trial:
    return Trial(tmp_path)


def now() -> datetime:
    return datetime.now(UTC)


def test_a_common_pair_that_is_over_is_removed_and_written_down(trial: Trial) -> None:
    trial.put(now() - timedelta(hours=3))
    trial.look()
    assert not trial.certless.exists()
    assert trial.said == ["certless.pem was removed: it is over"]
    assert trial.said[0] in (trial.paths.log / "cluster.log").read_text()


def test_one_that_lasts_or_has_not_begun_stays(trial: Trial) -> None:
    for made in (now(), now() + timedelta(hours=1)):
        trial.put(made)
        trial.look()
        assert trial.certless.exists()
    assert trial.said == []


def test_one_that_can_not_be_used_is_said_and_removed(trial: Trial) -> None:
    trial.certless.write_text("broken")
    trial.certless.chmod(0o600)
    trial.look()
    assert not trial.certless.exists()
    (line,) = trial.said
    assert line.startswith("certless.pem was removed: it can't be used: ")


def test_a_dangling_link_is_removed_as_well(trial: Trial) -> None:
    trial.certless.symlink_to("nowhere")
    trial.look()
    assert not trial.certless.is_symlink()


def test_a_journal_on_a_node_that_is_not_the_master_is_left_alone(trial: Trial) -> None:
    trial.paths.renewal.write_text("of another time")
    trial.look()
    assert trial.said == []
    assert trial.paths.renewal.read_text() == "of another time"


def test_trouble_is_said_once_and_ends_nothing(
    trial: Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise NoCluster

    trial.paths.renewal.write_text("one")
    monkeypatch.setattr(trial.store, "load", fail)
    for _ in range(2):
        trial.look()
    (line,) = trial.said
    assert line.startswith("certificates could not be looked after: ")
