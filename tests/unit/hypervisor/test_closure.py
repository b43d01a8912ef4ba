"""What is read from a program's own header, and from where its data directories' links lead."""

import contextlib
import struct
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hypervisor.closure import find_closure, interpreter_of
from hypervisor.errors import ClosureError

ELF = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")


def header(*segments: tuple[int, bytes]) -> bytes:
    """An ELF file's beginning with these program headers and their contents."""
    table, body = b"", b""
    start = 64 + 56 * len(segments)
    for kind, content in segments:
        offset = start + len(body)
        table += struct.pack("<IIQQQQQQ", kind, 4, offset, 0, 0, len(content), len(content), 1)
        body += content
    rest = struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, 64, 0, 0, 64, 56, len(segments), 64, 0, 0)
    return ELF + rest + table + body


def test_the_interpreter_is_the_one_that_the_program_names() -> None:
    head = header((1, b"code"), (3, b"/lib64/ld-linux-x86-64.so.2\0"))
    assert interpreter_of(head) == Path("/lib64/ld-linux-x86-64.so.2")


def test_a_static_program_has_no_interpreter() -> None:
    assert interpreter_of(header((1, b"code"))) is None


def test_a_static_program_is_its_own_closure(tmp_path: Path) -> None:
    path = tmp_path / "standin"
    path.write_bytes(header((1, b"code")))
    (tmp_path / "link").symlink_to(path)
    found = find_closure(tmp_path / "link", accelerator="tcg", credentials=None)
    assert (found.program, found.binds) == (str(path), ((str(path), str(path)),))


@pytest.mark.parametrize(
    "content", [b"", b"#!/bin/sh\n", b"\x7fELF\x01\x01", ELF, header((3, b"/lib/ld\0"))[:-4]]
)
def test_what_is_no_program_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "kvm"
    path.write_bytes(content)
    with pytest.raises(ClosureError, match="is not a program"):
        find_closure(path, accelerator="kvm", credentials=None)


@given(st.binary(max_size=300), st.integers(0, 200), st.binary(max_size=40))
@example(tail=b"", place=39, noise=b"\x80")
def test_a_damaged_header_never_ends_in_another_error(
    tail: bytes, place: int, noise: bytes
) -> None:
    sound = header((1, b"code"), (3, b"/lib64/ld.so\0")) + tail
    with contextlib.suppress(ValueError, struct.error):
        interpreter_of(sound[:place] + noise + sound[place + len(noise) :])
