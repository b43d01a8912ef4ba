"""A town of nodes, and the key files of one of them."""

from pathlib import Path

import pytest

from kvmsec.pki.certificates import (
    Pair,
)
from kvmsec.pki.files import KeyFiles
from tests.unit.kvmsec.pki.authorities import Town, make_cluster
from tests.unit.kvmsec.pki.key_file_steps import READERS, common_pair


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


@pytest.fixture
def full(files: KeyFiles, town: Town) -> KeyFiles:
    files.put("server.key", town.cluster.key_pem)
    files.put("certless.pem", common_pair().pem)
    files.write_candidates(town.trust().candidates)
    for _, read in READERS:
        read(files)
    return files
