"""Which uids are fit for a pool, decided from account files made for the test."""

import itertools
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uidpool.accounts import AccountRules, Problem, find_problems, resolve_domain
from uidpool.errors import UnfitDomain
from uidpool.foreign import FOREIGN, foreign_parts
from uidpool.ranges import EMPTY, UidRanges
from uidpool.snapshot import Snapshot

Etc = Callable[..., Snapshot]
RULES = AccountRules()
FIT_USER = "kvmsec-{0}:x:{0}:{0}:kvmsec instance:/nonexistent:/usr/sbin/nologin"
FIT_GROUP = "kvmsec-{0}:x:{0}:"


@pytest.fixture
def etc(tmp_path: Path) -> Etc:
    """Writes account files and reads them; each argument is a list of lines."""

    def read(only: UidRanges | None = None, **files: list[str]) -> Snapshot:
        for name, lines in files.items():
            (tmp_path / name).write_text("\n".join(lines) + "\n")
        return Snapshot.read(etc=tmp_path, run=tmp_path / "run", only=only)

    return read


def fit(*uids: int) -> dict[str, list[str]]:
    return {
        "passwd": [FIT_USER.format(uid) for uid in uids],
        "group": [FIT_GROUP.format(uid) for uid in uids],
    }


def problems_of(pool: str, snapshot: Snapshot, rules: AccountRules = RULES) -> list[Problem]:
    return list(find_problems(UidRanges.parse(pool), rules, snapshot))


def codes(problems: list[Problem]) -> list[tuple[str, str]]:
    return [(problem.code, str(problem.uids)) for problem in problems]


def test_users_with_nothing_but_themselves_are_fit(etc: Etc) -> None:
    assert problems_of("210000-210002", etc(**fit(210000, 210001, 210002))) == []


def test_missing_users_are_reported_as_ranges(etc: Etc) -> None:
    found = problems_of("210000-210009", etc(**fit(210003, 210004)))
    assert codes(found) == [("missing", "210000-210002,210005-210009")]
    assert "provision" in found[0].hint


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (
            {"passwd": [FIT_USER.format(210000).replace("/usr/sbin/nologin", "/bin/bash")]},
            "login-shell",
        ),
        ({"passwd": [FIT_USER.format(210000).replace("/usr/sbin/nologin", "")]}, "login-shell"),
        ({"passwd": [FIT_USER.format(210000), "twin:x:210000:210000::/:/bin/false"]}, "shared-uid"),
        ({"passwd": ["a:x:210000:6::/:/bin/false"], "group": ["disk:x:6:"]}, "primary-group"),
        ({"passwd": ["a:x:210000:210009::/:/bin/false"]}, "primary-group"),
        ({"passwd": [FIT_USER.format(210000), "other:x:5:210000::/:/bin/false"]}, "primary-group"),
        ({"group": ["kvmsec-210000:x:210000:mallory"]}, "primary-group"),
        ({"group": [FIT_GROUP.format(210000), "disk:x:6:a,kvmsec-210000"]}, "supplementary-group"),
        ({"subuid": ["kvmsec-210000:300000:65536"]}, "subordinate-ids"),
        ({"subgid": ["210000:300000:65536"]}, "subordinate-ids"),
        ({"subuid": ["alice:200000:65536"]}, "subordinate-range"),
        ({"subgid": ["alice:210000:1"]}, "subordinate-range"),
    ],
)
def test_what_makes_a_user_unfit_is_named(
    etc: Etc, change: dict[str, list[str]], code: str
) -> None:
    found = problems_of("210000", etc(**{**fit(210000), **change}))
    assert codes(found) == [(code, "210000")]
    assert found[0].hint
    assert "210000" in found[0].message


def test_a_look_at_one_uid_finds_what_a_look_at_all_finds(etc: Etc) -> None:
    files = {
        "passwd": [
            *(FIT_USER.format(uid) for uid in range(210000, 210050)),
            "twin:x:210007:7::/:/bin/sh",
            "guest:x:77:210008::/:/bin/false",
            "odd:x:210060:210061::/:/bin/false",
            "sharer:x:78:210061::/:/bin/false",
        ],
        "group": [
            *(FIT_GROUP.format(uid) for uid in range(210000, 210050)),
            "odd:x:210061:",
            "disk:x:6:kvmsec-210009,odd",
        ],
        "subuid": ["kvmsec-210010:300000:10", "alice:210011:2"],
    }
    every = problems_of("210000-210060", etc(**files))
    for uid in range(210000, 210061):
        only = UidRanges.of((uid, uid))
        single = list(find_problems(only, RULES, etc(only=only)))
        assert {one.code for one in single} == {one.code for one in every if uid in one.uids}, uid


@pytest.mark.parametrize(
    ("uid", "owner"),
    [
        (999, "packages"),
        (60001, "homed"),
        (61184, "DynamicUser"),
        (64055, "libvirt"),
        (65534, "nobody"),
        (65535, "16-bit"),
        (524288, "nspawn"),
        (1879048191, "nspawn"),
        (2147352576, "foreign"),
    ],
)
def test_a_range_of_somebody_else_is_refused_with_its_owner(etc: Etc, uid: int, owner: str) -> None:
    found = problems_of(str(uid), etc(**fit(uid)))
    assert "foreign-range" in [one.code for one in found]
    assert owner in found[0].message


@pytest.mark.parametrize("uid", [1000, 59999, 65536, 524287, 1879048192, 2147352575])
def test_the_uids_between_the_foreign_ranges_are_free(uid: int) -> None:
    assert foreign_parts(UidRanges.of((uid, uid))) == []


def test_the_foreign_ranges_are_sorted_and_disjoint() -> None:
    pairs = [pair for foreign in FOREIGN for pair in foreign.uids.ranges]
    assert pairs == sorted(pairs)
    assert all(one[1] < two[0] for one, two in itertools.pairwise(pairs))


def test_the_configuration_frees_a_foreign_range_but_not_what_is_in_it(
    etc: Etc, tmp_path: Path
) -> None:
    rules = AccountRules(freed=UidRanges.parse("61184-65519,524288-1879048191"))
    running = tmp_path / "run/systemd"
    (running / "dynamic-uid").mkdir(parents=True)
    (running / "dynamic-uid/61200").touch()
    (running / "dynamic-uid/direct:61200").touch()
    (running / "nspawn-uid").mkdir()
    (running / "nspawn-uid/589824").touch()
    snapshot = etc(**fit(61199, 61200, 524288, 600000))
    found = problems_of("61199-61200,524288,600000", snapshot, rules)
    assert codes(found) == [("in-use", "61200"), ("in-use", "600000")]


@pytest.mark.parametrize("freed", ["1", "999", "65534", "65535-65536"])
def test_some_ranges_can_never_be_freed(freed: str) -> None:
    with pytest.raises(ValueError, match="can't be freed"):
        AccountRules(freed=UidRanges.parse(freed))


def test_a_pool_of_two_thousand_million_uids_gets_few_problems_quickly(etc: Etc) -> None:
    pool = UidRanges.parse("1000-2147483647")
    snapshot = etc(**fit(210000, 210001))
    started = time.perf_counter()
    found = list(find_problems(pool, RULES, snapshot.with_asked(pool)))
    assert time.perf_counter() - started < 2
    assert len(found) < 20
    assert sum(len(one.message) for one in found) < 5000
    missing = [one for one in found if one.code == "missing"]
    assert any("name service" in one.message for one in missing)


def test_a_thousand_odd_uids_make_one_short_problem(etc: Etc) -> None:
    found = problems_of(",".join(str(uid) for uid in range(210000, 212000, 2)), etc(**fit()))
    assert codes(found)[0][0] == "missing"
    assert len(found) == 1
    assert "and 995 more" in found[0].message


def test_the_users_that_newusers_made_are_one_problem(etc: Etc) -> None:
    uids = range(210000, 210100)
    subuid = [f"kvmsec-{uid}:{uid * 100}:10" for uid in uids]
    found = problems_of("210000-210099", etc(**fit(*uids), subuid=subuid))
    assert codes(found) == [("subordinate-ids", "210000-210099")]


def test_broken_lines_are_skipped_as_glibc_skips_them(etc: Etc) -> None:
    files = fit(210000)
    files["passwd"] += ["", "# no", "+::::::", "short:x:1", "x:x:y:z:::", "\udcff:x:1:1::/:/bin/sh"]
    files["subuid"] = ["alice:x:1", "alice:4294967295:99", "bob:210000:0", "c:1"]
    snapshot = etc(
        **{
            name: [line.encode(errors="replace").decode() for line in lines]
            for name, lines in files.items()
        }
    )
    assert problems_of("210000", snapshot) == []


def test_no_account_files_means_that_every_user_is_missing(tmp_path: Path) -> None:
    snapshot = Snapshot.read(etc=tmp_path, run=tmp_path)
    assert codes(problems_of("210000", snapshot)) == [("missing", "210000")]


def test_a_user_that_only_the_name_service_knows_is_asked_for(tmp_path: Path) -> None:
    snapshot = Snapshot.read(etc=tmp_path, run=tmp_path).with_asked(UidRanges.of((0, 0)))
    assert [user.name for user in snapshot.by_uid[0]] == ["root"]
    assert snapshot.groups[0].name == "root"


@given(st.sets(st.integers(210000, 210030)), st.sets(st.integers(210000, 210030)))
def test_missing_is_the_pool_without_the_users(
    tmp_path_factory: pytest.TempPathFactory, existing: set[int], wanted: set[int]
) -> None:
    etc = tmp_path_factory.mktemp("etc")
    (etc / "passwd").write_text("".join(FIT_USER.format(uid) + "\n" for uid in existing))
    (etc / "group").write_text("".join(FIT_GROUP.format(uid) + "\n" for uid in existing))
    pool = UidRanges.of_uids(wanted)
    found = list(find_problems(pool, RULES, Snapshot.read(etc=etc, run=etc)))
    assert {uid for one in found for uid in one.uids} == wanted - existing


@pytest.mark.parametrize(
    ("user", "reason"),
    [
        ("root", "root"),
        ("", "no user name"),
        ("a\0b", "no user name"),
        ("x" * 4096, "no such user"),
        ("no-such-user", "no such user"),
        ("0", "no such user"),
        ("../x", "no such user"),
        ("\udcff", "no such user"),
        ("nobody", "shared by many"),
    ],
)
def test_a_domain_that_no_instance_may_run_as_is_refused(user: str, reason: str) -> None:
    with pytest.raises(UnfitDomain) as caught:
        resolve_domain(user, EMPTY, RULES)
    assert reason in caught.value.message
    assert len(caught.value.message) < 300


def test_a_domain_in_a_privileged_group_is_refused() -> None:
    rules = AccountRules(privileged_groups=frozenset({"games"}))
    with pytest.raises(UnfitDomain, match="privileged group games"):
        resolve_domain("games", EMPTY, rules)


def test_a_domain_with_a_uid_of_the_pool_is_refused() -> None:
    with pytest.raises(UnfitDomain, match="belongs to the cluster's pool"):
        resolve_domain("games", UidRanges.parse("5"), RULES)


def test_an_unprivileged_user_is_a_domain() -> None:
    account = resolve_domain("games", EMPTY, RULES)
    assert (account.name, account.uid) == ("games", 5)
