"""What every test of claims draws from."""

from pathlib import Path

import pytest

from tests.unit.uidpool.node import Node


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)
