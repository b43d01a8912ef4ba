"""Every code that `cluster verify` may give; docs/verify.md says what each means."""

from typing import Final, Literal

from kvmsec.agent import Finding

Severity = Literal["ok", "warning", "error"]

CODES: Final = frozenset(
    {
        *("node-ok", "node-silent", "node-refused", "node-leaving", "node-unreadable"),
        *("node-foreign", "clock", "version", "copy-old", "copy-newer", "copy-unconfirmed"),
        *("anchor-differs", "anchor-expires", "anchor-missing"),
        *("certificate-missing", "certificate-expires", "certificate-early"),
        *("certificate-name", "certificate-shared", "certificate-unknown"),
        *("candidates-unreadable", "candidate-unlisted", "candidate-other", "plain-listed"),
        *("stranger-listed", "candidates-few", "key-missing", "key-on-plain"),
        *("renewal-pending", "certless", "certless-missing"),
        *("pool-user", "lease-dead", "instance-unleased"),
        *("rules", "model-none", "confinement"),
    }
)


def found(
    code: str, severity: Severity, node: str, item: str, message: str, hint: str | None = None
) -> Finding:
    """A finding of one of the documented codes."""
    assert code in CODES, code
    return Finding(code, severity, item, message, hint, node)
