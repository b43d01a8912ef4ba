"""The host's accounts, read in one pass over their files, with what was asked of NSS beside it."""

import grp
import os
import pwd
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, Self

from attrs import evolve, frozen

from kvmsec.linux.files import read_bounded
from uidpool.ranges import EMPTY, UidRanges

_FILE_LIMIT_BYTES: Final = 64 << 20
_FEW: Final = 16
_ASKED_MOST: Final = 256
_ASKED_S: Final = 0.5
_NSPAWN_UIDS: Final = 1 << 16


@frozen
class Account:
    """A user as passwd(5) describes it."""

    uid: int
    gid: int
    name: str
    home: str
    shell: str
    gecos: str = ""


@frozen
class Group:
    """A group as group(5) describes it."""

    gid: int
    name: str
    members: tuple[str, ...] = ()


@frozen
class Delegation:
    """Subordinate ids that `file` (/etc/subuid or /etc/subgid) gives to the user `owner`."""

    file: str
    owner: str
    uids: UidRanges


@frozen(eq=False)
class Snapshot:
    """The accounts at one moment; what is decided from it needs no further look at the host.

    `by_uid` keeps every user of a uid (there may be several), `supplementary` the gids that name a
    user as a member, `delegations` /etc/subuid and /etc/subgid, and `running` the uids that systemd
    has given out for now. `unasked` are uids that no file knows and NSS wasn't asked for.
    """

    by_uid: dict[int, tuple[Account, ...]]
    by_name: dict[str, Account]
    groups: dict[int, Group]
    supplementary: dict[str, tuple[int, ...]]
    delegations: tuple[Delegation, ...]
    running: tuple[tuple[UidRanges, str], ...] = ()
    unasked: UidRanges = EMPTY

    @classmethod
    def read(
        cls, *, etc: Path = Path("/etc"), run: Path = Path("/run"), only: UidRanges | None = None
    ) -> Self:
        """Read passwd, group, subuid and subgid; lines that their readers skip are skipped.

        With a few uids as `only`, entries that can't matter to them are left out, so that a look
        at one uid stays quick on a node with thousands of users. Raises OSError.
        """
        few = only if only is not None and only.size() <= _FEW else None
        users = list(_read_users(etc / "passwd", few))
        groups = list(_read_groups(etc / "group", None if few is None else users))
        by_uid: dict[int, tuple[Account, ...]] = {}
        for user in users:
            by_uid[user.uid] = (*by_uid.get(user.uid, ()), user)
        return cls(
            by_uid=by_uid,
            by_name={user.name: user for user in reversed(users)},
            groups={group.gid: group for group in reversed(groups)},
            supplementary=_memberships(groups),
            delegations=(*_read_delegations(etc / "subuid"), *_read_delegations(etc / "subgid")),
            running=tuple(_read_running(run / "systemd")),
        )

    def uids(self) -> UidRanges:
        """Every uid that some user has."""
        return UidRanges.of_uids(self.by_uid)

    def with_asked(self, uids: UidRanges) -> Self:
        """The same with those users that only NSS knows (LDAP, for one), asked for one by one.

        Bounded to 256 uids and half a second, since a directory may be far away: the rest of
        `uids` is in `unasked`.
        """
        deadline = time.monotonic() + _ASKED_S
        found: list[Account] = []
        last_asked = -1
        missing = uids - self.uids()
        for count, uid in enumerate(missing):
            if count >= _ASKED_MOST or time.monotonic() > deadline:
                break
            last_asked = uid
            if account := ask_for(uid):
                found.append(account)
        unasked = missing - UidRanges.of((0, last_asked)) if last_asked >= 0 else missing
        groups = {user.gid: group for user in found if (group := _ask_for_group(user.gid))}
        return evolve(
            self,
            by_uid={**self.by_uid, **{user.uid: (user,) for user in found}},
            by_name={**{user.name: user for user in found}, **self.by_name},
            groups={**groups, **self.groups},
            supplementary={**self.supplementary, **{user.name: asked_gids(user) for user in found}},
            unasked=unasked,
        )


def find_account(uid: int, etc: Path = Path("/etc")) -> Account | None:
    """The user of a uid: by passwd or, where that doesn't have it, by NSS. Raises OSError."""
    users = _read_users(etc / "passwd", UidRanges.of((uid, uid)))
    return next((user for user in users if user.uid == uid), None) or ask_for(uid)


def ask_for(uid: int) -> Account | None:
    """The user of a uid as NSS knows it (getpwuid(3)), None when it knows none."""
    try:
        return account_of(pwd.getpwuid(uid))
    except KeyError:
        return None


def account_of(entry: pwd.struct_passwd) -> Account:
    return Account(
        uid=entry.pw_uid,
        gid=entry.pw_gid,
        name=entry.pw_name,
        home=entry.pw_dir,
        shell=entry.pw_shell,
        gecos=entry.pw_gecos,
    )


def asked_gids(user: Account) -> tuple[int, ...]:
    """The gids of a user's supplementary groups, from every source of NSS (getgrouplist(3))."""
    return tuple(gid for gid in os.getgrouplist(user.name, user.gid) if gid != user.gid)


def _ask_for_group(gid: int) -> Group | None:
    try:
        entry = grp.getgrgid(gid)
    except KeyError:
        return None
    return Group(entry.gr_gid, entry.gr_name, tuple(entry.gr_mem))


def _content(path: Path) -> bytes:
    try:
        return read_bounded(path, _FILE_LIMIT_BYTES)
    except FileNotFoundError:
        return b""


def _fields(line: bytes, count: int) -> list[str] | None:
    """The fields of an entry, None for what glibc would skip (comments, NIS lines, nonsense)."""
    if not line or line[:1] in (b"#", b"+", b"-", b" ", b"\t"):
        return None
    fields = line.decode(errors="surrogateescape").split(":")
    return fields if len(fields) == count else None


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 10 else None


def _read_users(path: Path, few: UidRanges | None) -> Iterator[Account]:
    content = _content(path)
    if few is None:
        yield from _parse_users(content.split(b"\n"))
        return
    # ":uid:" stands in the lines of a uid's own users, and of those with it as primary group.
    kept = list(_parse_users(_lines_with(content, (f":{uid}:".encode() for uid in few))))
    yield from kept
    gids = {user.gid for user in kept if user.uid in few and user.gid not in few}
    others = _parse_users(_lines_with(content, (f":{gid}:".encode() for gid in gids)))
    yield from (user for user in others if user not in kept)


def _lines_with(content: bytes, words: Iterable[bytes]) -> list[bytes]:
    """The lines that hold one of the words, without looking at each of thousands of lines."""
    found: dict[bytes, None] = {}
    for word in words:
        end = -1
        while (place := content.find(word, end + 1)) >= 0:
            end = content.find(b"\n", place)
            end = len(content) if end < 0 else end
            found[content[content.rfind(b"\n", 0, place) + 1 : end]] = None
    return list(found)


def _parse_users(lines: Iterable[bytes]) -> Iterator[Account]:
    for line in lines:
        fields = _fields(line, 7)
        if fields is None:
            continue
        uid, gid = _number(fields[2]), _number(fields[3])
        if uid is not None and gid is not None:
            yield Account(uid, gid, fields[0], fields[5], fields[6], fields[4])


def _read_groups(path: Path, few: list[Account] | None) -> Iterator[Group]:
    content = _content(path)
    if few is None:
        lines = content.split(b"\n")
    else:
        words = {f":{user.gid}:" for user in few} | {user.name for user in few}
        lines = _lines_with(content, (os.fsencode(word) for word in sorted(words)))
    for line in lines:
        fields = _fields(line, 4)
        if fields is None:
            continue
        gid = _number(fields[2])
        if gid is not None:
            members = tuple(name.strip() for name in fields[3].split(",") if name.strip())
            yield Group(gid, fields[0], members)


def _memberships(groups: list[Group]) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for group in groups:
        for name in group.members:
            found[name] = (*found.get(name, ()), group.gid)
    return found


def _read_delegations(path: Path) -> Iterator[Delegation]:
    for line in _content(path).split(b"\n"):
        fields = _fields(line, 3)
        if fields is None:
            continue
        start, count = _number(fields[1]), _number(fields[2])
        if start is None or not count or start + count - 1 >= 2**32:
            continue
        uids = UidRanges.of((start, start + count - 1))
        yield Delegation(f"/etc/{path.name}", fields[0], uids)


def _read_running(systemd: Path) -> Iterator[tuple[UidRanges, str]]:
    """What systemd has given out until its services and containers end: a lock file each."""
    for uid in _numbered_entries(systemd / "dynamic-uid"):
        yield UidRanges.of((uid, uid)), "a running service (DynamicUser)"
    for uid in _numbered_entries(systemd / "nspawn-uid"):
        yield UidRanges.of((uid, uid + _NSPAWN_UIDS - 1)), "a systemd-nspawn container"


def _numbered_entries(directory: Path) -> list[int]:
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return []
    return [uid for name in names if (uid := _number(name)) is not None]
