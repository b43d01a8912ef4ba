"""The iptables backend: the legacy tables of both families, each with a chain of our own."""

import functools
import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from attrs import define, field

from firewall.backend import BackendName, Dropped, Finding, Installed
from firewall.errors import BackendUnavailable, RulesRefused, RulesUnreadable
from firewall.iptables import ruleset, saved
from firewall.iptables.commit import TableChange, commit, restore_text
from firewall.iptables.counters import read_dropped, tables_in_use
from firewall.iptables.ruleset import Rule
from firewall.iptables.saved import Tables
from firewall.policy import FAMILIES, TAG_PATTERN, Family, Policy
from kvmsec.linux import command
from kvmsec.linux.children import run_in_child
from kvmsec.linux.errors import ChildFailed, ChildTimedOut, CommandFailed, CommandTimedOut, LockBusy
from kvmsec.linux.locks import FileLock
from kvmsec.linux.namespaces import CLONE_NEWNET, unshare

# iptables(8): every tool that changes legacy tables holds it, python-iptables does not.
_XTABLES_LOCK: Final = Path("/run/xtables.lock")
_LOCK_DEADLINE_S: Final = 10.0
_COMMAND_DEADLINE_S: Final = 20.0
_COMMIT_DEADLINE_S: Final = 60.0

_COMMANDS: Final[dict[Family, str]] = {"ipv4": "iptables", "ipv6": "ip6tables"}
_INSTALL_HINT: Final = "apt-get install iptables"
_KERNEL_HINT: Final = (
    "the kernel needs the legacy tables filter and mangle for IPv4 and IPv6 with xt_owner, "
    "xt_connmark, xt_limit and xt_LOG (modprobe ip_tables ip6_tables), or set the firewall's "
    "backend to nftables"
)
_UNFIT: Final = "no such parameter"
"""What python-iptables says of an option that it can't find in iptables' own table of them: 1.2.0
reads that table in the layout that it had before iptables 1.8.11."""
_PRIVILEGE_HINT: Final = "run as root, with CAP_NET_ADMIN in this network namespace"
_LOCK_HINT: Final = "another tool is changing packet rules: wait for it, then try again"


@define
class IptablesBackend:
    """Rules in chains named TAG of `filter` and `mangle`, for both families or for none."""

    tag: str
    name: BackendName = field(default="iptables", init=False)

    def require_available(self) -> None:
        """Try the real rule set in an empty network namespace, unless rules already hold here."""
        try:
            if all(_has_chain(self._read_family(family), self.tag) for family in FAMILIES):
                return
            if importlib.util.find_spec("iptc") is None:
                hint = "pip install python-iptables"
                raise BackendUnavailable(self.name, "python-iptables is missing", hint=hint)
            for family in FAMILIES:
                _tool(family, "restore")
            trial = _trial_script(self.tag)
            run_in_child(
                lambda: _restore_elsewhere(trial),
                what="applying the rules in an empty network namespace",
                timeout_s=_COMMAND_DEADLINE_S,
            )
        except FileNotFoundError as error:
            raise BackendUnavailable(self.name, _missing(error), hint=_INSTALL_HINT) from error
        except (ChildFailed, ChildTimedOut) as error:
            raise BackendUnavailable(self.name, error.message, hint=_KERNEL_HINT) from error
        except RulesUnreadable as error:
            raise BackendUnavailable(self.name, error.detail, hint=error.hint or "") from error

    def apply(self, policy: Policy) -> bool:
        with self._locked():
            before = self._read()
            changes = _plan(policy, before)
            if not changes:
                return False
            try:
                self._commit(changes, before)
                self._require(policy)
            except (ChildFailed, ChildTimedOut, CommandFailed, CommandTimedOut) as error:
                self._put_back(before)
                raise RulesRefused(
                    self.name, "apply the rules", error.message, hint=_KERNEL_HINT
                ) from error
            except RulesRefused:
                self._put_back(before)
                raise
        return True

    def _commit(self, changes: Sequence[TableChange], before: Mapping[Family, Tables]) -> None:
        """By python-iptables; where it does not fit this iptables, by iptables-restore."""
        try:
            run_in_child(
                lambda: commit(changes), what="changing the rules", timeout_s=_COMMIT_DEADLINE_S
            )
        except ChildFailed as error:
            # It is found while rules are made, which is before the first commit.
            if _UNFIT not in error.message:
                raise
            for change in changes:
                present = saved.chain_of(before[change.family], change.table, change.chain) or ()
                _restore(change.family, restore_text(change, present))

    def _require(self, policy: Policy) -> None:
        """A commit that the library thinks well of must also read back right."""
        if findings := _compare(policy, self._read()):
            raise RulesRefused(self.name, "apply the rules", findings[0].message, hint=_KERNEL_HINT)

    def remove(self) -> bool:
        with self._locked():
            return self._put_back({family: {} for family in FAMILIES})

    def _put_back(self, before: Mapping[Family, Tables]) -> bool:
        """Make our chains what they were; the lock is held. False when they already are."""
        changed = False
        for family, now in self._read().items():
            script = saved.restore_script(now, before[family], self.tag)
            if script:
                self._restore(family, script)
                changed = True
        return changed

    def _restore(self, family: Family, script: str) -> None:
        try:
            _restore(family, script)
        except (CommandFailed, CommandTimedOut) as error:
            detail = f"{family}: {error.message}"
            raise RulesRefused(
                self.name, "put the chains back", detail, hint=_KERNEL_HINT
            ) from error

    def _locked(self) -> FileLock:
        lock = FileLock(_XTABLES_LOCK)
        try:
            lock.acquire(_LOCK_DEADLINE_S)
        except (LockBusy, OSError) as error:
            hint = _LOCK_HINT if isinstance(error, LockBusy) else _PRIVILEGE_HINT
            raise RulesRefused(self.name, "take the xtables lock", str(error), hint=hint) from error
        return lock

    def read(self) -> Installed | None:
        tables = self._read()
        if not any(_has_chain(tables[family], self.tag) for family in FAMILIES):
            return None
        in_force = tuple(family for family in FAMILIES if _is_asked(tables[family], self.tag))
        # A uid that only one family refuses is refused by neither, as far as anyone may rely on it.
        both = [saved.uids(tables[family], self.tag) for family in FAMILIES]
        return Installed(
            in_force,
            both[0] if both[0] == both[1] else (),
            saved.dropped_by_family(tables, self.tag),
            tuple(_lines(tables, self.tag)),
        )

    def compare(self, policy: Policy) -> tuple[Finding, ...]:
        return _compare(policy, self._read())

    def dropped(self, *, of_all_tags: bool = False) -> Dropped:
        def is_ours(chain: str) -> bool:
            return bool(TAG_PATTERN.fullmatch(chain)) if of_all_tags else chain == self.tag

        return Dropped(*(read_dropped(family, is_ours) for family in FAMILIES))

    def _read(self) -> dict[Family, Tables]:
        return {family: self._read_family(family) for family in FAMILIES}

    def _read_family(self, family: Family) -> Tables:
        """What iptables-save says; nothing is asked, and no table made, where there is none."""
        if not tables_in_use(family) & set(ruleset.TABLES):
            return {}
        try:
            done = command.run([_tool(family, "save"), "-c"], timeout_s=_COMMAND_DEADLINE_S)
            return saved.parse_save(done.stdout.decode(errors="replace"))
        except FileNotFoundError as error:
            raise RulesUnreadable(self.name, _missing(error), hint=_INSTALL_HINT) from error
        except (CommandFailed, CommandTimedOut, ValueError) as error:
            raise RulesUnreadable(self.name, f"{family}: {error}", hint=_PRIVILEGE_HINT) from error


def _plan(policy: Policy, tables: Mapping[Family, Tables]) -> list[TableChange]:
    """The tables that must change; one that is right stays as it is, counters and all."""
    changes = []
    for family in FAMILIES:
        for table, wanted in ruleset.rules(policy).items():
            findings = saved.compare_table(wanted, tables[family], table, policy.tag, family)
            if findings:
                is_bypassed = any(finding.code == "rules-bypassed" for finding in findings)
                changes.append(_change(policy.tag, family, table, wanted, tables, is_bypassed))
    return changes


def _change(
    tag: str,
    family: Family,
    table: str,
    wanted: Sequence[Rule],
    tables: Mapping[Family, Tables],
    is_bypassed: bool,
) -> TableChange:
    lines = saved.chain_of(tables[family], table, tag) or ()
    hook = saved.chain_of(tables[family], table, ruleset.HOOK) or ()
    jumps = sum(line.words == ("-j", tag) for line in hook)
    rules = tuple(zip(wanted, saved.heirs(wanted, lines), strict=True))
    return TableChange(family, table, tag, rules, jumps if is_bypassed else None)


def _compare(policy: Policy, tables: Mapping[Family, Tables]) -> tuple[Finding, ...]:
    return tuple(
        finding for family in FAMILIES for finding in saved.compare(policy, tables[family], family)
    )


def _has_chain(tables: Tables, tag: str) -> bool:
    return any(saved.chain_of(tables, table, tag) is not None for table in ruleset.TABLES)


def _is_asked(tables: Tables, tag: str) -> bool:
    """Whether every packet that leaves reaches our chains."""
    return not any(saved.jump_problem(tables, table, tag) for table in ruleset.TABLES)


def _lines(tables: Mapping[Family, Tables], tag: str) -> list[str]:
    return [
        f"{family} {table}: -A {chain} {line.text}"
        for family in FAMILIES
        for table in ruleset.TABLES
        for chain in (ruleset.HOOK, tag)
        for line in saved.chain_of(tables[family], table, chain) or ()
        if chain == tag or line.words == ("-j", tag)
    ]


def _trial_script(tag: str) -> str:
    """A rule set of one uid, with every match and target that a policy can need."""
    policy = Policy(((4294967293, 4294967294),), tag=tag)
    lines = []
    for table, wanted in ruleset.rules(policy).items():
        lines += [f"*{table}", f":{tag} - [0:0]", *(rule.line(tag) for rule in wanted), "COMMIT"]
    return "\n".join([*lines, ""])


def _restore_elsewhere(script: str) -> None:
    unshare(CLONE_NEWNET)
    for family in FAMILIES:
        _restore(family, script)


def _restore(family: Family, script: str) -> None:
    """The caller holds the lock, which the tool would wait for: it is given one of its own."""
    tool = _tool(family, "restore")
    command.run(
        ["env", f"XTABLES_LOCKFILE={os.devnull}", tool, "--noflush", "--counters"],
        input=script.encode(),
        timeout_s=_COMMAND_DEADLINE_S,
    )


@functools.cache
def _tool(family: Family, verb: str) -> str:
    """The legacy flavour of a tool: `iptables` alone may be the one that writes nftables.

    Raises FileNotFoundError.
    """
    name = _COMMANDS[family]
    for candidate in (f"{name}-legacy", name):
        try:
            version = command.run([candidate, "--version"], timeout_s=_COMMAND_DEADLINE_S)
        except (FileNotFoundError, CommandFailed):
            continue
        if b"legacy" in version.stdout:
            return f"{candidate}-{verb}"
    raise FileNotFoundError(2, "no such program", f"{name}-legacy")


def _missing(error: FileNotFoundError) -> str:
    return f"{error.filename or 'iptables'} is missing"
