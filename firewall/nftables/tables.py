"""The nftables backend: one `inet` table of our own for both families."""

import contextlib
import difflib
import json
from typing import Any, Final

from attrs import define, field

from firewall.backend import BackendName, Dropped, Finding, Installed
from firewall.errors import BackendUnavailable, RulesRefused, RulesUnreadable
from firewall.nftables import ruleset
from firewall.nftables.counters import read_dropped
from firewall.nftables.library import Command, Nft, NftFailed, load_library
from firewall.policy import FAMILIES, TAG_PATTERN, Family, Policy, UidPairs, format_uids
from kvmsec.linux.children import run_in_child
from kvmsec.linux.errors import ChildFailed, ChildTimedOut
from kvmsec.linux.namespaces import CLONE_NEWNET, unshare

_REFERENCE_DEADLINE_S: Final = 10.0
_MEND_HINT: Final = "run `kvmsec firewall apply` to put the rules back"


@define
class NftablesBackend:
    """Rules in the table `inet TAG` (nft(8)), all of them in one transaction."""

    tag: str
    name: BackendName = field(default="nftables", init=False)
    _nft: Nft = field(factory=lambda: load_library() or Command())
    _references: dict[Any, list[str]] = field(factory=dict, init=False)

    def require_available(self) -> None:
        """Have the kernel judge an empty rule set; one that is in force is answer enough."""
        try:
            if self._list_structure(self.tag) is None:
                self._nft.check(ruleset.install(Policy((), tag=self.tag)))
        except NftFailed as error:
            raise BackendUnavailable(self.name, error.detail, hint=_advice(error.detail)) from error

    def apply(self, policy: Policy) -> bool:
        there = self._structure()
        is_intact = there is not None and there == self._reference(policy)
        if is_intact and self._uids() == policy.uids:
            return self._remove_stand_in()
        try:
            self._nft.change(ruleset.install(policy))
        except NftFailed as error:
            if there is None:
                raise self._refused("apply the rules", error) from error
            self._rebuild(policy)  # Something of a name of ours, but of another kind.
        else:
            # Only where something else was different can anything foreign be left in our table.
            if there is not None and not is_intact and self.compare(policy):
                self._rebuild(policy)
        self._remove_stand_in()
        return True

    def _remove_stand_in(self) -> bool:
        """Delete what a rebuild that was killed half-way left; False when there is nothing."""
        if self._list_structure(self._stand_in) is None:
            return False
        self._delete(self._stand_in)
        return True

    @property
    def _stand_in(self) -> str:
        return f"{self.tag}_mend"

    def _rebuild(self, policy: Policy) -> None:
        """Replace a table that can't be put right in place, and keep its counters.

        A base chain that is deleted and made anew lets packets through in between (some tens in
        millions), so a second table of the same rules stands in meanwhile.
        """
        stand_in = self._stand_in
        rules = ruleset.install(policy, {family: self._counter(family) for family in FAMILIES})
        twin = ruleset.install(policy).replace(f" inet {self.tag}", f" inet {stand_in}")
        try:
            self._nft.change(ruleset.remove(stand_in) + twin)
            self._nft.change(ruleset.remove(self.tag) + rules)
            self._nft.change(ruleset.remove(stand_in))
        except NftFailed as error:
            # If that fails too: it holds our rules, and the next change deletes it.
            with contextlib.suppress(RulesRefused):
                self._delete(stand_in)
            raise self._refused("apply the rules", error) from error
        if findings := self.compare(policy):
            raise RulesRefused(self.name, "apply the rules", findings[0].message, hint=_MEND_HINT)

    def _delete(self, table: str) -> None:
        try:
            self._nft.change(ruleset.remove(table))
        except NftFailed as error:
            raise self._refused(f"remove the table {table}", error) from error

    def remove(self) -> bool:
        present = [table for table in self._tables() if table in (self.tag, self._stand_in)]
        for table in present:
            self._delete(table)
        return bool(present)

    def _tables(self) -> list[str]:
        try:
            return [table["name"] for table in self._objects("tables inet", "table")]
        except NftFailed as error:
            raise self._unreadable(error) from error

    def read(self) -> Installed | None:
        structure = self._structure()
        if structure is None:
            return None
        try:
            uids = self._uids()
        except RulesUnreadable:
            uids = ()  # A table that somebody emptied; compare says so.
        is_dormant = "\tflags dormant" in structure
        rules = tuple(line.strip() for line in structure if line.strip())
        return Installed(() if is_dormant else FAMILIES, uids, self.dropped(), rules)

    def compare(self, policy: Policy) -> tuple[Finding, ...]:
        there = self._structure()
        if there is None:
            return (Finding("rules-missing", f"there is no table inet {self.tag}", _MEND_HINT),)
        expected = self._reference(policy)
        if there != expected:
            return (_changed(self.tag, expected, there),)
        return _compare_uids(policy.uids, self._uids())

    def _structure(self) -> list[str] | None:
        try:
            return self._list_structure(self.tag)
        except NftFailed as error:
            raise self._unreadable(error) from error

    def _list_structure(self, table: str) -> list[str] | None:
        """A table as nft writes it down, without elements and counters; None if missing."""
        try:
            return self._nft.list_structure(f"table inet {table}").splitlines()
        except NftFailed as error:
            if error.is_missing_object:
                return None
            raise

    def _reference(self, policy: Policy) -> list[str]:
        """What this very nft and kernel make of the policy, read from an empty namespace.

        Every release of nft writes rules down in its own way (and kernels fold bit operations),
        so an expectation written here would hold for one release.
        """
        key = (policy.tag, policy.log)
        if key not in self._references:
            bare = Policy((), policy.log, policy.tag)
            try:
                lines = run_in_child(
                    lambda: _install_elsewhere(self._nft, bare),
                    what="applying the rules in an empty network namespace",
                    timeout_s=_REFERENCE_DEADLINE_S,
                )
            except (ChildFailed, ChildTimedOut) as error:
                raise RulesUnreadable(
                    self.name, error.message, hint=_advice(error.message)
                ) from error
            self._references[key] = lines
        return self._references[key]

    def _uids(self) -> UidPairs:
        try:
            sets = self._objects(f"set inet {self.tag} {ruleset.POOL}", "set")
            return ruleset.parse_uids(sets[0].get("elem", ()))
        except (NftFailed, ValueError, IndexError) as error:
            raise RulesUnreadable(self.name, str(error), hint=_MEND_HINT) from error

    def dropped(self, *, of_all_tags: bool = False) -> Dropped:
        def is_ours(table: str) -> bool:
            return bool(TAG_PATTERN.fullmatch(table)) if of_all_tags else table == self.tag

        return read_dropped(is_ours)

    def _counter(self, family: Family) -> tuple[int, int]:
        """Packets and bytes; zero where the counter is missing."""
        name = ruleset.COUNTERS[family]
        try:
            found = self._objects(f"counter inet {self.tag} {name}", "counter")
        except NftFailed:
            return (0, 0)
        return (found[0]["packets"], found[0]["bytes"]) if found else (0, 0)

    def _objects(self, what: str, kind: str) -> list[dict[str, Any]]:
        listed = json.loads(self._nft.list_json(what) or '{"nftables": []}')
        return [entry[kind] for entry in listed["nftables"] if kind in entry]

    def _refused(self, action: str, error: NftFailed) -> RulesRefused:
        return RulesRefused(self.name, action, error.detail, hint=_advice(error.detail))

    def _unreadable(self, error: NftFailed) -> RulesUnreadable:
        return RulesUnreadable(self.name, error.detail, hint=_advice(error.detail))


def _install_elsewhere(nft: Nft, policy: Policy) -> list[str]:
    unshare(CLONE_NEWNET)
    nft.change(ruleset.install(policy))
    return nft.list_structure(f"table inet {policy.tag}").splitlines()


def _changed(tag: str, expected: list[str], there: list[str]) -> Finding:
    difference = [
        line
        for line in difflib.unified_diff(expected, there, lineterm="", n=0)
        if not line.startswith(("---", "+++", "@@"))
    ]
    if "+\tflags dormant" in difference:
        message = f"the table inet {tag} is dormant: it is listed but not in force"
        return Finding("rules-dormant", message, _MEND_HINT)
    words = "; ".join(" ".join(line.split()) for line in difference[:6])
    return Finding("rules-changed", f"the table inet {tag} was changed: {words}", _MEND_HINT)


def _compare_uids(expected: UidPairs, there: UidPairs) -> tuple[Finding, ...]:
    if expected == there:
        return ()
    message = (
        f"the rules hold for uids {format_uids(there) or 'none'} "
        f"instead of {format_uids(expected) or 'none'}"
    )
    return (Finding("uids-differ", message, _MEND_HINT),)


def _advice(detail: str) -> str:
    """What to do about a refusal; the words are strerror's, which nft passes on."""
    if "is there" in detail:
        return "apt-get install nftables"
    if "Operation not permitted" in detail or "cache initialization failed" in detail:
        return "run as root, with CAP_NET_ADMIN in this network namespace"
    if "syntax error" in detail or "unknown identifier" in detail or "JSON" in detail:
        return "this nft is too old: 1.0.6 or later is needed (apt-get install nftables)"
    return (
        "the kernel needs nf_tables with nft_ct, nft_log, nft_limit and nf_conntrack "
        "(modprobe them), or set the firewall's backend to iptables"
    )
