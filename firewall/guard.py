"""What a node asks of its packet filter: hold the policy, prove it, show it, take it away."""

import errno
import re
from collections.abc import Mapping
from typing import Any, Final

from attrs import define, field

from firewall.backend import (
    BACKENDS,
    Backend,
    Dropped,
    Finding,
    Installed,
    Setting,
    make_backend,
    open_backend,
)
from firewall.canary import Report, probe
from firewall.drops import read_last_drops
from firewall.errors import BackendUnavailable, NotProved, PolicyError, RulesUnreadable
from firewall.policy import DEFAULT_TAG, FAMILIES, Policy, UidPairs, format_uids

_VERIFY_HINT: Final = "see what `kvmsec firewall verify` finds, and `kvmsec firewall show`"
_APPLY_HINT: Final = (
    "run `kvmsec firewall apply`; if this finding stays, see `kvmsec firewall show`, and look for "
    "what changes the rules back"
)
_FOREIGN_HINT: Final = (
    "another firewall refuses these packets before kvmsec's rules see them, so that nothing shows "
    "what happens once it is gone: look for rules about this uid in `nft list ruleset` and "
    "`iptables-legacy-save`, and take them away"
)
_ACTING_HINT: Final = "run as root: to act as another uid takes CAP_SETUID and CAP_SETGID"
_HINTS: Final[Mapping[int | None, str]] = {
    errno.ENETUNREACH: "bring the loopback interface up: ip link set lo up",
    errno.EACCES: "something other than a packet rule refuses it (a security module?): "
    + _VERIFY_HINT,
}
_LOG_WORDS: Final = re.compile(
    r'(?:log prefix|--(?:nf)?log-prefix) (?:"(?P<quoted>[^"]*)"|(?P<bare>\S+))'
    r"(?:.*(?:group|--nflog-group) (?P<group>\d+))?"
)


@define
class Firewall:
    """The rule set of one root of kvmsec, in the network namespace of the caller.

    `setting` is the backend that the configuration asks for; `tag` names the rules. Methods raise
    FirewallError's children. "No instance is running" is for the caller to know before `remove`.
    """

    setting: Setting = "auto"
    tag: str = DEFAULT_TAG
    _backend: Backend | None = field(default=None, init=False)

    @property
    def backend(self) -> Backend:
        """The backend in use; raises BackendUnavailable."""
        if self._backend is None:
            self._backend = open_backend(self.setting, self.tag)
        return self._backend

    def apply(self, policy: Policy) -> bool:
        """Make the rules hold; False when they did already.

        Rules that another backend holds under this tag go once these do. Raises RulesRefused,
        and what was in force before still is.
        """
        self._require_ours(policy)
        changed = self.backend.apply(policy)
        for other in self._others():
            changed = other.remove() or changed
        return changed

    def prove(self, uid: int, gid: int, policy: Policy) -> Report:
        """Return once the kernel has shown that the uid can send nothing; else raise NotProved.

        The rules are read, and mended, only when a packet doesn't prove it; then another is sent.
        """
        self._require_ours(policy)
        if not policy.covers(uid):
            reason = "the policy in force does not name it"
            raise NotProved(uid, reason, report=None, hint=_VERIFY_HINT)
        report = self._probe(uid, gid)
        if report.is_proof:
            return report
        self.apply(policy)
        report = self._probe(uid, gid, of_all_tags=True)
        if problem := _packet_problem(report) or self._rules_problem(report, policy):
            raise problem
        return report

    def _rules_problem(self, report: Report, policy: Policy) -> NotProved | None:
        """A packet that was no full proof counts only beside rules that read back right."""
        findings = self.backend.compare(policy)
        if not findings:
            return None
        reason = "; ".join(finding.message for finding in findings)
        return NotProved(report.uid, reason, report=report, hint=_VERIFY_HINT)

    def _probe(self, uid: int, gid: int, *, of_all_tags: bool = False) -> Report:
        read_dropped = self._dropped_by_all if of_all_tags else self.backend.dropped
        try:
            return probe(uid, gid, read_dropped)
        except OSError as error:
            reason = f"the canary can't be sent as that uid: {error.strerror}"
            raise NotProved(uid, reason, report=None, hint=_ACTING_HINT) from error

    def _dropped_by_all(self) -> Dropped:
        """Drops by every rule set of kvmsec's.

        Two roots of one host may forbid the same uid, and only the first that sees a packet can
        drop and count it. Such a drop is kvmsec's own, and is accepted as one where this root's
        rules read back right.
        """
        total = self.backend.dropped(of_all_tags=True)
        for other in self._served_others():
            total += other.dropped(of_all_tags=True)
        return total

    def verify(
        self, policy: Policy, *, canary: tuple[int, int] | None = None
    ) -> tuple[Finding, ...]:
        """Compare the rules with the policy and send the canary; changes nothing.

        `canary` is the uid and gid to send it as: the policy's lowest uid (as its own group)
        unless told. Raises BackendUnavailable and RulesUnreadable.
        """
        self._require_ours(policy)
        findings = list(self.backend.compare(policy))
        findings += [
            Finding(
                "other-backend",
                f"rules of the {other.name} backend are still there",
                "run `kvmsec firewall apply` to remove them",
                (),
            )
            for other in self._served_others()
            if other.read() is not None
        ]
        if policy.uids:
            uid, gid = canary or (policy.uids[0][0],) * 2
            findings += self._verify_by_packet(uid, gid)
        return tuple(findings)

    def _verify_by_packet(self, uid: int, gid: int) -> list[Finding]:
        try:
            problem = _packet_problem(self._probe(uid, gid, of_all_tags=True))
        except NotProved as error:
            problem = error
        if problem is None:
            return []
        hint = _APPLY_HINT if problem.hint in (None, _VERIFY_HINT) else problem.hint
        return [Finding("canary-failed", problem.message, hint)]

    def show(self) -> dict[str, Any]:
        """The rules in force, their counters and the last drops, as plain data; never a change.

        Keys: `backend` (None without rules), `tag`, `uids` (text), `families`, `dropped_packets`,
        `dropped` by family, `rules` (lines), `log` (`prefix`, `group`), `last_drops` (from the
        kernel's log) and `last_drops_note` (why there are none to show).
        """
        for backend in self._all():
            if (installed := backend.read()) is not None:
                return _describe(backend, installed)
        return {
            "backend": None,
            "tag": self.tag,
            "uids": "",
            "families": [],
            "dropped_packets": 0,
            "dropped": dict.fromkeys(FAMILIES, 0),
            "rules": [],
            "log": None,
            "last_drops": [],
            "last_drops_note": "no rules are in force",
        }

    def remove(self) -> bool:
        """Take away every rule under the tag, whichever backend holds it; False without any.

        The caller makes sure that no instance runs under them.
        """
        removed = [backend.remove() for backend in self._all()]
        return any(removed)

    def _require_ours(self, policy: Policy) -> None:
        if policy.tag != self.tag:
            raise PolicyError([f"a policy for {policy.tag} given to the rules of {self.tag}"])

    def _others(self) -> list[Backend]:
        """The other backends, where they may hold rules of this tag."""
        return [other for other in self._served_others() if other.read() is not None]

    def _served_others(self) -> list[Backend]:
        return [one for one in self._all() if one.name != self.backend.name]

    def _all(self) -> list[Backend]:
        """Every backend that can be read here; one that this host can't serve holds nothing."""
        backends = [make_backend(name, self.tag) for name in BACKENDS]
        return [backend for backend in backends if _is_readable(backend)]


def _packet_problem(report: Report) -> NotProved | None:
    """What a packet met that it should not have, whatever the rules look like."""
    if report.failures:
        reason = "; ".join(str(attempt) for attempt in report.failures)
        hint = _HINTS.get(report.failures[0].error, _VERIFY_HINT)
        return NotProved(report.uid, reason, report=report, hint=hint)
    if report.uncounted:
        families = " and ".join(report.uncounted)
        reason = f"kvmsec's drop counter for {families} did not rise"
        return NotProved(report.uid, reason, report=report, hint=_FOREIGN_HINT)
    return None


def _is_readable(backend: Backend) -> bool:
    try:
        backend.read()
    except RulesUnreadable:
        try:
            backend.require_available()
        except BackendUnavailable:
            return False
        raise
    return True


def _describe(backend: Backend, installed: Installed) -> dict[str, Any]:
    log = _find_log(installed.rules)
    drops, note = _last_drops(log, installed.uids)
    return {
        "backend": backend.name,
        "tag": backend.tag,
        "uids": format_uids(installed.uids),
        "families": list(installed.families),
        "dropped_packets": installed.dropped.total,
        "dropped": {family: installed.dropped.of(family) for family in FAMILIES},
        "rules": list(installed.rules),
        "log": log,
        "last_drops": drops,
        "last_drops_note": note,
    }


def _find_log(rules: tuple[str, ...]) -> dict[str, Any] | None:
    """The log settings that the rules themselves have."""
    for rule in rules:
        if found := _LOG_WORDS.search(rule):
            group = found["group"]
            prefix = found["quoted"] if found["quoted"] is not None else found["bare"]
            return {"prefix": prefix, "group": int(group) if group is not None else None}
    return None


def _last_drops(
    log: dict[str, Any] | None, uids: UidPairs
) -> tuple[list[dict[str, Any]], str | None]:
    if log is None:
        return [], "the rules log nothing"
    if log["group"] is not None:
        return (
            [],
            f"drops go to log group {log['group']}: read them there (ulogd, tcpdump -i nflog)",
        )
    try:
        return [drop.plain() for drop in read_last_drops(log["prefix"], uids)], None
    except OSError as error:
        return [], f"the kernel's log can't be read here: {error.strerror}"
