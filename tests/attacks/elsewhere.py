"""Attacks on the packet rules that need more than two: the rules' own suite carries them out.

Under both packet filters, as everything there; the table names them, and tests that each is there.
"""

from typing import Final

from tests.attacks.attack import Elsewhere

_PACKETS: Final = "tests/contract/firewall/test_packets.py"
_COOKIES: Final = "tests/contract/firewall/test_cookies.py"

ELSEWHERE: Final = (
    Elsewhere(
        "mark-a-service",
        "packet rules",
        f"{_PACKETS}::test_no_service_is_silenced_by_a_mark_on_its_connection",
        f"{_PACKETS}::test_a_rule_that_trusts_a_connections_mark_silences_a_service",
    ),
    Elsewhere(
        "cookie-shut-window",
        "packet rules",
        f"{_COOKIES}::test_a_shut_window_gets_nothing_out",
        f"{_COOKIES}::test_a_plain_owner_rule_gives_it_all_out",
    ),
    Elsewhere(
        "leak-while-reapplied",
        "packet rules",
        f"{_PACKETS}::test_reapplying_under_traffic_leaks_nothing",
        f"{_PACKETS}::test_rules_that_are_taken_away_first_leak",
    ),
)
