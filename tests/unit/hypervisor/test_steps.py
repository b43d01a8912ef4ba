"""Steps are taken in their order, and the one that fails is told."""

import errno

import pytest

from hypervisor.errors import JailFailed
from hypervisor.steps import Step, take


def noting(name: str) -> Step[list[str]]:
    return Step(name, lambda taken: taken.append(name), "for the test")


def failing(error: OSError) -> Step[list[str]]:
    def fail(_: list[str]) -> None:
        raise error

    return Step("failing", fail, "for the test")


def test_they_are_taken_in_their_order() -> None:
    taken: list[str] = []
    take([noting("one"), noting("two"), noting("three")], taken)
    assert taken == ["one", "two", "three"]


@pytest.mark.parametrize(
    ("error", "number", "has_hint"),
    [
        (OSError(errno.ENOENT, "gone", "/path"), errno.ENOENT, False),
        (PermissionError(errno.EPERM, "no"), errno.EPERM, True),
        (OSError(errno.ESTALE, "was replaced", "/path"), errno.ESTALE, True),
        (OSError(errno.EXDEV, "another root"), errno.EXDEV, True),
        (OSError("without a number"), 0, False),
    ],
)
def test_none_is_taken_after_the_one_that_fails(
    error: OSError, number: int, has_hint: bool
) -> None:
    taken: list[str] = []
    with pytest.raises(JailFailed, match="'failing' failed") as raised:
        take([noting("one"), failing(error), noting("two")], taken)
    assert taken == ["one"]
    assert (raised.value.step, raised.value.errno) == ("failing", number)
    assert raised.value.detail == str(error)
    assert (raised.value.hint is not None) == has_hint


def test_what_is_no_answer_of_the_kernels_is_a_bug_and_stays_one() -> None:
    def fail(_: list[str]) -> None:
        raise KeyError("bug")

    with pytest.raises(KeyError, match="bug"):
        take([Step("failing", fail, "for the test")], [])
