"""Events are kept within a bound."""

from hypervisor.monitor.events import KEPT_BYTES, KEPT_EVENTS, EventLog


def names(log: EventLog) -> list[str]:
    return [event.name for event in log.kept]


def test_the_oldest_events_are_dropped_and_the_gap_shows() -> None:
    log = EventLog()
    for number in range(KEPT_EVENTS + 10):
        log.add(f"E{number}", b"{}")

    assert len(log.kept) == KEPT_EVENTS == 256
    assert [names(log)[0], names(log)[-1]] == ["E10", f"E{KEPT_EVENTS + 9}"]
    assert log.kept[0].sequence == 10


def test_large_events_are_bounded_by_their_size() -> None:
    log = EventLog()
    for _ in range(20):
        log.add("BIG", bytes(KEPT_BYTES // 4))

    assert len(log.kept) == 4
    log.add("HUGE", bytes(2 * KEPT_BYTES))
    assert names(log) == ["HUGE"]
