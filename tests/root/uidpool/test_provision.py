"""The pool's users, made and taken back for real in a private /etc."""

import os
import time
from pathlib import Path

import pytest

from kvmsec.linux import command
from uidpool import userdb
from uidpool.accounts import AccountRules, check_pool, resolve_domain
from uidpool.errors import AccountsBusy, UidsInUse, UnfitDomain
from uidpool.provision import (
    REAPER,
    apply,
    find_reaper,
    plan,
    plan_removal,
    remove,
    sysusers_text,
)
from uidpool.ranges import EMPTY, UidRanges
from uidpool.snapshot import Snapshot, find_account

pytestmark = pytest.mark.root
RULES = AccountRules()
FILES = ("passwd", "group", "shadow", "gshadow", "subuid", "subgid")


def contents() -> dict[str, bytes]:
    paths = [Path("/etc") / name for name in FILES]
    return {path.name: path.read_bytes() for path in paths if path.exists()}


def provision(pool: UidRanges) -> None:
    apply(plan(pool, Snapshot.read(), RULES))


def unprovision(pool: UidRanges) -> None:
    remove(plan_removal(pool, Snapshot.read()))


def test_a_thousand_users_are_made_and_removed_in_seconds() -> None:
    pool = UidRanges.parse("212000-212999")
    before, files = contents(), set(os.listdir("/etc"))
    started = time.monotonic()
    provision(pool)
    made_s = time.monotonic() - started
    assert check_pool(pool, RULES) == ()
    assert contents().get("subuid") == before.get("subuid")
    assert find_reaper(Snapshot.read())
    started = time.monotonic()
    unprovision(pool)
    removed_s = time.monotonic() - started
    assert contents() == before
    backups = {".pwd.lock", *(f"{name}-" for name in FILES)}
    assert set(os.listdir("/etc")) - files <= backups
    assert made_s < 10
    assert removed_s < 5


def test_users_are_what_accounts_ask_for_and_a_second_run_changes_nothing() -> None:
    pool = UidRanges.parse("213000-213002")
    provision(pool)
    try:
        account = find_account(213001)
        assert account is not None
        assert (account.name, account.gid, account.shell) == (
            "kvmsec-213001",
            213001,
            "/usr/sbin/nologin",
        )
        shadow = [line for line in Path("/etc/shadow").read_text().splitlines() if "213001" in line]
        assert shadow[0].split(":")[1].startswith("!")
        after = contents()
        provision(pool)
        assert contents() == after
        with pytest.raises(UnfitDomain):
            resolve_domain("kvmsec-213001", EMPTY, RULES)
        with pytest.raises(UnfitDomain):
            resolve_domain(REAPER, EMPTY, RULES)
    finally:
        unprovision(pool)


def test_a_pool_that_grows_keeps_its_users() -> None:
    pool = UidRanges.parse("213100-213105")
    provision(UidRanges.parse("213102"))
    provision(pool)
    try:
        assert check_pool(pool, RULES) == ()
    finally:
        unprovision(pool)


def test_removal_leaves_what_somebody_else_made_or_changed() -> None:
    pool = UidRanges.parse("213200-213203")
    provision(UidRanges.parse("213200-213202"))
    run("usermod", "--shell", "/bin/sh", "kvmsec-213201")
    run("groupadd", "--gid", "213203", "alice")
    run("useradd", "--uid", "213203", "--gid", "alice", "--no-create-home", "alice")
    try:
        removal = plan_removal(pool, Snapshot.read())
        assert str(removal.remove) == "213200,213202"
        assert str(removal.kept) == "213201,213203"
        remove(removal)
        left = Snapshot.read()
        assert "alice" in left.by_name
        assert "kvmsec-213201" in left.by_name
        assert find_reaper(left)
    finally:
        run("userdel", "alice")
        run("usermod", "--shell", "/usr/sbin/nologin", "kvmsec-213201")
        unprovision(pool)
    assert REAPER not in Snapshot.read().by_name


def test_a_user_that_changed_since_the_plan_is_not_removed() -> None:
    pool = UidRanges.parse("213300-213301")
    provision(pool)
    try:
        removal = plan_removal(pool, Snapshot.read())
        run("usermod", "--shell", "/bin/sh", "kvmsec-213300")
        remove(removal)
        assert "kvmsec-213300" in Snapshot.read().by_name
        assert "kvmsec-213301" not in Snapshot.read().by_name
    finally:
        run("usermod", "--shell", "/usr/sbin/nologin", "kvmsec-213300")
        unprovision(pool)


def test_leased_users_are_not_removed() -> None:
    pool = UidRanges.parse("213400-213401")
    provision(pool)
    try:
        with pytest.raises(UidsInUse, match="213401"):
            plan_removal(pool, Snapshot.read(), leased=UidRanges.parse("213401"))
    finally:
        unprovision(pool)


def test_the_printed_file_makes_the_same_users(tmp_path: Path) -> None:
    pool = UidRanges.parse("213500-213501")
    path = tmp_path / "kvmsec.conf"
    path.write_text(sysusers_text(pool))
    run("systemd-sysusers", str(path))
    try:
        wanted = plan(pool, Snapshot.read(), RULES)
        assert not wanted.create
        assert not wanted.makes_reaper
        assert check_pool(pool, RULES) == ()
    finally:
        unprovision(pool)


def test_the_lock_is_the_one_that_the_account_tools_take() -> None:
    with userdb.locked():
        busy = command.run(
            ["timeout", "2", "useradd", "--no-create-home", "bob"], timeout_s=30, ok=range(-64, 256)
        )
        assert busy.status != 0
    assert "bob" not in Snapshot.read().by_name
    with userdb.locked(), pytest.raises(AccountsBusy):
        run_python("from uidpool import userdb\nwith userdb.locked(): pass")


def run_python(text: str) -> None:
    from kvmsec.linux.children import run_in_child
    from kvmsec.linux.errors import ChildFailed

    try:
        run_in_child(lambda: exec(text), what="another removal", timeout_s=10)
    except ChildFailed as failure:
        if failure.kind == "AccountsBusy":
            raise AccountsBusy(Path("/etc/.pwd.lock")) from None
        raise


def run(*argv: str) -> None:
    command.run(argv, timeout_s=30)
