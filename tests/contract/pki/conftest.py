"""A directory of its own for `openssl`."""

from pathlib import Path

import pytest

from tests.contract.pki.openssl_program import Openssl


@pytest.fixture
def openssl(tmp_path: Path) -> Openssl:
    return Openssl(tmp_path)
