"""Attacks that other suites carry out: the table names them, and a test that each is there."""

from typing import Final

from tests.attacks.attack import Elsewhere

_HOSTILE: Final = "tests/kvm/hostile/test_hostile_instance.py"
_HOSTILE_QEMU: Final = "tests/kvm/hostile/test_hostile_qemu.py"
_TAKEN_OVER: Final = "tests/kvm/hostile/test_taken_over.py"
_PACKETS: Final = "tests/contract/firewall/test_packets.py"

ELSEWHERE: Final = (
    Elsewhere(
        "monitor-flood", "bounded reads", f"{_HOSTILE}::test_one_that_does_not_is_killed_in_time"
    ),
    Elsewhere(
        "monitor-silence", "deadlines", f"{_HOSTILE}::test_one_that_does_not_is_killed_in_time"
    ),
    Elsewhere(
        "monitor-flood-at-start",
        "bounded reads",
        f"{_HOSTILE_QEMU}::test_a_flood_costs_little_memory",
    ),
    Elsewhere(
        "monitor-silence-at-start",
        "deadlines",
        f"{_HOSTILE_QEMU}::test_a_qemu_that_is_not_ready_in_time_is_ended",
    ),
    Elsewhere(
        "monitor-passes-descriptors",
        "SO_PASSRIGHTS",
        f"{_TAKEN_OVER}::test_a_descriptor_that_it_passes_holds_nobody_up",
    ),
    Elsewhere(
        "monitor-mute-at-stop",
        "deadlines",
        f"{_TAKEN_OVER}::test_a_mute_monitor_holds_a_stop_up_no_longer_than_it_was_told",
    ),
    Elsewhere(
        "serial-never-drained",
        "never waits",
        f"{_HOSTILE}::test_a_line_that_it_holds_shut_keeps_nobody_waiting",
    ),
    Elsewhere(
        "serial-flood",
        "sized tmpfs",
        "tests/kvm/test_lifecycle.py::test_a_guest_that_floods_its_serial_line_fills_nothing_and_hides_nothing",
    ),
    Elsewhere(
        "log-fill",
        "sized tmpfs",
        f"{_HOSTILE}::test_an_instance_that_fills_its_output_fills_nothing_else",
    ),
    Elsewhere(
        "log-as-link",
        "opened without links",
        f"{_HOSTILE}::test_what_stands_in_its_logs_place_leads_nowhere",
    ),
    Elsewhere(
        "disk-as-link",
        "opened without links",
        "tests/kvm/hostile/test_bad_input.py::test_a_link_that_is_swapped_in_between_look_and_start_is_not_followed",
    ),
    Elsewhere(
        "pid-of-another",
        "pidfd and start time",
        "tests/unit/kvmsec/linux/test_processes.py::test_another_process_with_the_same_pid_is_not_taken_for_the_first",
    ),
    Elsewhere(
        "outlive-by-forking",
        "PID namespace",
        f"{_HOSTILE}::test_children_that_nobody_waits_for_end_with_it",
    ),
    Elsewhere(
        "outlive-by-tracer",
        "sweep by uid",
        f"{_TAKEN_OVER}::test_a_tracer_outside_keeps_nothing_alive",
    ),
    Elsewhere(
        "leave-outside",
        "sweep by uid",
        f"{_HOSTILE}::test_all_that_the_uid_left_on_the_node_goes_with_the_instance",
    ),
    Elsewhere(
        "left-for-the-next-holder",
        "clean before release",
        "tests/attacks/test_next_holder.py::test_nothing_is_left_for_the_uids_next_holder",
    ),
    Elsewhere(
        "leave-what-stays",
        "quarantine",
        f"{_HOSTILE}::test_what_can_not_be_cleaned_keeps_the_uid_from_being_drawn",
    ),
    Elsewhere("keep-tap", "record", f"{_HOSTILE}::test_a_tap_that_it_made_last_goes_all_the_same"),
    Elsewhere(
        "give-tap-away", "record", f"{_TAKEN_OVER}::test_a_tap_that_it_gave_away_keeps_no_uid"
    ),
    Elsewhere(
        "race-stop-with-start",
        "lock of the instance",
        "tests/kvm/test_fleet.py::test_a_start_and_a_stop_at_once_leave_it_running_or_stopped",
    ),
    Elsewhere(
        "race-stop-with-reconcile",
        "lock of the instance",
        "tests/attacks/test_races.py::test_a_stop_that_others_reconcile_against_ends_all_of_it",
    ),
    Elsewhere(
        "race-stop-while-forking",
        "control group",
        "tests/attacks/test_races.py::test_a_stop_and_a_start_at_once_leave_nothing_of_the_first",
    ),
    Elsewhere(
        "race-two-starts",
        "lock of the instance",
        "tests/kvm/test_fleet.py::test_of_two_starts_of_one_name_one_wins_and_the_other_is_refused",
    ),
    Elsewhere(
        "mark-a-service",
        "packet rules",
        f"{_PACKETS}::test_no_service_is_silenced_by_a_mark_on_its_connection",
    ),
    Elsewhere(
        "cookie-shut-window",
        "packet rules",
        "tests/contract/firewall/test_cookies.py::test_a_shut_window_gets_nothing_out",
    ),
    Elsewhere(
        "leak-while-reapplied",
        "packet rules",
        f"{_PACKETS}::test_reapplying_under_traffic_leaks_nothing",
    ),
)
