"""An image's identity is its device and inode, and survives being written down."""

import contextlib
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypervisor.images import ImageIdentity

devices = st.builds(os.makedev, st.integers(0, 4095), st.integers(0, 2**20 - 1))
identities = st.one_of(
    st.builds(ImageIdentity, st.just("file"), devices, st.integers(0, 2**64 - 1)),
    st.builds(ImageIdentity, st.just("block"), devices),
)


@given(identities)
def test_what_was_written_is_read_back(identity: ImageIdentity) -> None:
    assert ImageIdentity.parse(str(identity)) == identity


def test_two_names_of_one_file_are_one_identity(tmp_path: Path) -> None:
    first, second, other = (tmp_path / name for name in ("first", "second", "other"))
    first.touch()
    other.touch()
    second.hardlink_to(first)

    assert ImageIdentity.of(first.stat()) == ImageIdentity.of(second.stat())
    assert ImageIdentity.of(first.stat()) != ImageIdentity.of(other.stat())


def test_a_directory_is_no_image(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither"):
        ImageIdentity.of(tmp_path.stat())


@pytest.mark.parametrize(
    "text",
    ["", "file", "file 8:1", "file 8:1 x", "file 8:1 1 ", "block 8:1 5", "block -1:1", "block ٣:1"],
)
def test_other_text_is_no_identity(text: str) -> None:
    with pytest.raises(ValueError, match="identity"):
        ImageIdentity.parse(text)


@given(
    st.text(max_size=40) | st.from_regex(r"(file|block) [0-9]+:[0-9]+( [0-9]+)?", fullmatch=True)
)
def test_any_text_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert isinstance(ImageIdentity.parse(text), ImageIdentity)
