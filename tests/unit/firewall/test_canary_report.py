"""What a canary's answers prove, and what they don't."""

import errno

from firewall.backend import Dropped
from firewall.canary import Attempt, Report

ABSENT = errno.EADDRNOTAVAIL


def report(ipv4: int | None, ipv6: int | None, *beyond: Attempt, risen: Dropped) -> Report:
    attempts = (
        Attempt("ipv4", "127.0.0.1", ipv4, True),
        Attempt("ipv6", "::1", ipv6, True),
        *beyond,
    )
    return Report(1000, attempts, risen)


def beyond(family: str, error: int | None) -> Attempt:
    return Attempt("ipv4" if family == "ipv4" else "ipv6", "far away", error, False)


def test_refused_and_counted_in_both_families_is_the_proof():
    assert report(errno.EPERM, errno.EPERM, risen=Dropped(1, 1)).is_proof


def test_more_drops_than_ours_are_fine():
    assert report(errno.EPERM, errno.EPERM, risen=Dropped(9, 9)).is_proof


def test_a_refusal_that_nobody_counted_is_none():
    got = report(errno.EPERM, errno.EPERM, risen=Dropped(1, 0))
    assert not got.is_proof
    assert got.uncounted == ("ipv6",)


def test_each_refusal_must_be_counted():
    got = report(errno.EPERM, errno.EPERM, beyond("ipv4", errno.EPERM), risen=Dropped(1, 1))
    assert got.uncounted == ("ipv4",)


def test_a_packet_that_went_is_a_failure_wherever_it_went():
    assert report(None, errno.EPERM, risen=Dropped(0, 1)).failures
    got = report(errno.EPERM, errno.EPERM, beyond("ipv6", None), risen=Dropped(1, 1))
    assert [attempt.address for attempt in got.failures] == ["far away"]


def test_a_family_that_is_missing_is_no_failure_and_no_proof():
    for error in (errno.EAFNOSUPPORT, ABSENT):
        got = report(errno.EPERM, error, risen=Dropped(1, 0))
        assert got.absent == ("ipv6",)
        assert not got.failures
        assert not got.is_proof


def test_a_family_without_loopback_is_proved_beyond_the_host():
    got = report(errno.EPERM, ABSENT, beyond("ipv6", errno.EPERM), risen=Dropped(1, 1))
    assert got.absent == ()
    assert got.is_proof


def test_a_family_is_missing_only_by_its_loopback():
    got = report(errno.EPERM, errno.EPERM, beyond("ipv6", ABSENT), risen=Dropped(1, 1))
    assert [attempt.address for attempt in got.failures] == ["far away"]


def test_other_errors_are_failures_that_name_themselves():
    for error in (errno.ENETUNREACH, errno.EACCES, errno.EINVAL, errno.ENOBUFS, 9999):
        (failure,) = report(error, errno.EPERM, risen=Dropped(0, 1)).failures
        assert errno.errorcode.get(error, "9999") in str(failure)
