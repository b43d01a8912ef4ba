"""What provisioning would make and take back, decided from account files made for the test."""

from pathlib import Path

import pytest

from uidpool import userdb
from uidpool.errors import AccountConflict, AccountsBusy, ProvisionError, UidsInUse, UnfitUids
from uidpool.provision import plan, plan_removal, sysusers_text, uid_of
from uidpool.ranges import EMPTY, UidRanges
from uidpool.snapshot import Snapshot

USER = "kvmsec-{0}:x:{0}:{0}:kvmsec instance:/nonexistent:/usr/sbin/nologin\n"
GROUP = "kvmsec-{0}:x:{0}:\n"
REAPER = "kvmsec-reaper:x:990:990:kvmsec reaper:/nonexistent:/usr/sbin/nologin\n"


def read(etc: Path, passwd: str = "", group: str = "", subuid: str = "") -> Snapshot:
    (etc / "passwd").write_text(passwd)
    (etc / "group").write_text(group)
    (etc / "subuid").write_text(subuid)
    return Snapshot.read(etc=etc, run=etc)


def users(*uids: int) -> tuple[str, str]:
    return "".join(USER.format(uid) for uid in uids), "".join(GROUP.format(uid) for uid in uids)


def pool(text: str) -> UidRanges:
    return UidRanges.parse(text)


def test_only_what_is_missing_is_made(tmp_path: Path) -> None:
    passwd, group = users(210001)
    wanted = plan(pool("210000-210002"), read(tmp_path, passwd, group))
    assert str(wanted.create) == "210000,210002"
    assert str(wanted.present) == "210001"
    assert wanted.makes_reaper


def test_a_second_run_has_nothing_to_do(tmp_path: Path) -> None:
    passwd, group = users(210000, 210001)
    wanted = plan(pool("210000-210001"), read(tmp_path, passwd + REAPER, group))
    assert not wanted.create
    assert not wanted.makes_reaper


def test_a_user_that_lost_its_group_is_completed(tmp_path: Path) -> None:
    wanted = plan(pool("210000"), read(tmp_path, USER.format(210000)))
    assert str(wanted.create) == "210000"


@pytest.mark.parametrize(
    ("passwd", "group", "said"),
    [
        ("kvmsec-210000:x:5:5::/:/bin/sh\n", "", "the user kvmsec-210000 has uid 5"),
        ("", "kvmsec-210000:x:7:\n", "the group kvmsec-210000 has gid 7"),
        ("", "others:x:210000:\n", "gid 210000 is the group 'others''s"),
    ],
)
def test_what_is_in_the_way_is_said(tmp_path: Path, passwd: str, group: str, said: str) -> None:
    with pytest.raises(AccountConflict) as caught:
        plan(pool("210000"), read(tmp_path, passwd, group))
    assert caught.value.conflicts == (said,)


def test_users_of_a_foreign_range_are_not_made(tmp_path: Path) -> None:
    with pytest.raises(UnfitUids, match="DynamicUser"):
        plan(pool("61184"), read(tmp_path))
    with pytest.raises(UnfitUids, match="alice"):
        plan(pool("210000"), read(tmp_path, subuid="alice:210000:10\n"))


def test_users_that_are_there_are_judged_as_well(tmp_path: Path) -> None:
    with pytest.raises(UnfitUids, match="Debian's static system users"):
        plan(pool("1-5"), read(tmp_path, "daemon:x:1:1::/:/usr/sbin/nologin\n", "daemon:x:1:\n"))
    passwd, group = users(210001)
    person = "alice:x:210000:210000::/home/alice:/bin/bash\n"
    with pytest.raises(UnfitUids, match="uid 210000: the user has a login shell"):
        plan(pool("210000-210001"), read(tmp_path, person + passwd, "alice:x:210000:\n" + group))


def test_two_thousand_million_users_are_not_made(tmp_path: Path) -> None:
    with pytest.raises(ProvisionError, match="65536 are the most"):
        plan(pool("1000-2147483647"), read(tmp_path))


def test_the_file_for_a_configuration_manager_names_every_user() -> None:
    assert sysusers_text(pool("210000-210001")).splitlines() == [
        'u kvmsec-reaper - "kvmsec reaper" /nonexistent /usr/sbin/nologin',
        'u kvmsec-210000 210000 "kvmsec instance" /nonexistent /usr/sbin/nologin',
        'u kvmsec-210001 210001 "kvmsec instance" /nonexistent /usr/sbin/nologin',
    ]


def test_removal_takes_what_was_made_and_the_reaper_with_the_last(tmp_path: Path) -> None:
    passwd, group = users(210000, 210001)
    snapshot = read(tmp_path, passwd + REAPER, group)
    some = plan_removal(pool("210000"), snapshot)
    assert (str(some.remove), some.removes_reaper) == ("210000", False)
    every = plan_removal(pool("210000-210001"), snapshot)
    assert (str(every.remove), every.removes_reaper) == ("210000-210001", True)


@pytest.mark.parametrize(
    ("passwd", "group"),
    [
        ("alice:x:210000:210000::/home/alice:/bin/bash\n", "alice:x:210000:\n"),
        (USER.format(210000).replace("nologin", "bash"), GROUP.format(210000)),
        (USER.format(210000).replace("kvmsec instance", "Bob"), GROUP.format(210000)),
        (USER.format(210000) + "twin:x:210000:210000::/:/bin/sh\n", GROUP.format(210000)),
        (USER.format(210000) + "kvmsec-210000:x:5:5::/:/bin/sh\n", GROUP.format(210000)),
        (USER.format(210000), GROUP.format(210000) + "disk:x:6:kvmsec-210000\n"),
        (USER.format(210000), "kvmsec-210000:x:210000:bob\n"),
        (USER.format(210000), "kvmsec-210000:x:7:\n"),
        (USER.format(210000), GROUP.format(210000) + "kvmsec-210000:x:7:\n"),
    ],
)
def test_a_user_that_is_not_as_it_was_made_stays(tmp_path: Path, passwd: str, group: str) -> None:
    wanted = plan_removal(pool("210000"), read(tmp_path, passwd, group))
    assert wanted.remove == EMPTY
    assert str(wanted.kept) == "210000"


def test_the_group_that_a_crash_left_is_removed(tmp_path: Path) -> None:
    wanted = plan_removal(pool("210000-210001"), read(tmp_path, "", GROUP.format(210000)))
    assert str(wanted.remove) == "210000"


def test_users_that_instances_hold_are_not_removed(tmp_path: Path) -> None:
    passwd, group = users(210000, 210001)
    with pytest.raises(UidsInUse, match="210001"):
        plan_removal(
            pool("210000-210001"), read(tmp_path, passwd, group), leased=pool("210001,999999")
        )


@pytest.mark.parametrize(
    ("name", "uid"),
    [
        ("kvmsec-210000", 210000),
        ("kvmsec-reaper", None),
        ("kvmsec-", None),
        ("kvmsec-007", None),
        ("kvmsec-٣", None),
        ("xkvmsec-1", None),
        ("kvmsec-1\n", None),
    ],
)
def test_only_names_that_are_made_are_ours(name: str, uid: int | None) -> None:
    assert uid_of(name) == uid


def test_entries_are_removed_and_everything_else_keeps_its_bytes(tmp_path: Path) -> None:
    passwd, group = users(210000, 210001)
    odd = "# a comment\n\nroot:x:0:0:root:/root:/bin/sh\n"
    for name, text in {"passwd": passwd, "group": group}.items():
        (tmp_path / name).write_text(odd + text + "+::::::\n")
    (tmp_path / "shadow").write_text("root:*::::::\nkvmsec-210000:!*:1::::::\nlast:x")
    (tmp_path / "shadow").chmod(0o640)
    userdb.remove_entries({"kvmsec-210000"}, tmp_path)
    assert (tmp_path / "passwd").read_text() == odd + USER.format(210001) + "+::::::\n"
    assert (tmp_path / "group").read_text() == odd + GROUP.format(210001) + "+::::::\n"
    assert (tmp_path / "shadow").read_text() == "root:*::::::\nlast:x"
    assert (tmp_path / "shadow").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "passwd-").read_text() == odd + passwd + "+::::::\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "group", "group-", "passwd", "passwd-", "shadow", "shadow-",
    ]  # fmt: skip


def test_a_removal_waits_for_nobody(tmp_path: Path) -> None:
    import multiprocessing

    def hold(ready: object, done: object) -> None:
        with userdb.locked(tmp_path):
            ready.set()  # type: ignore[attr-defined]
            done.wait(30)  # type: ignore[attr-defined]

    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    holder = context.Process(target=hold, args=(ready, done))
    holder.start()
    try:
        assert ready.wait(30)
        with pytest.raises(AccountsBusy), userdb.locked(tmp_path):
            pass
    finally:
        done.set()
        holder.join(30)
    with userdb.locked(tmp_path):
        pass
