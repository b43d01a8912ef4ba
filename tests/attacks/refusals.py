"""What several attacks are refused by, and how the kernel then answers.

Under kvmsec's own seccomp filter an answer is the same for all that it refuses.
"""

from typing import Final

from tests.attacks.attack import Refusal

KILLED: Final = Refusal("seccomp", "SIGSYS")  # What QEMU never does: see hypervisor.seccomp.rules.
NOT_PERMITTED: Final = Refusal("seccomp", "EPERM")
NO_SUCH_CALL: Final = Refusal("seccomp", "ENOSYS")
NO_LOCKS: Final = Refusal("seccomp", "ENOLCK")
NO_SUCH_FAMILY: Final = Refusal("seccomp", "EAFNOSUPPORT")
OPEN: Final = Refusal("seccomp alone", "succeeded")
PIDS: Final = Refusal("PID namespace", "ESRCH")
TREE: Final = Refusal("root tree", "ENOENT")
CAPABILITIES: Final = Refusal("no capability", "EPERM")
NETWORK: Final = Refusal("network namespace", "ENETUNREACH")
UNREACHABLE_HERE: Final = Refusal("network namespace", "ENETUNREACH|EADDRNOTAVAIL")
RULES: Final = Refusal("packet rules", "EPERM")
# The kernel tells a sender of UDP and ICMP that its packet was dropped, and others nothing.
RULES_UNTOLD: Final = Refusal("packet rules", "ETIMEDOUT")
NOEXEC: Final = Refusal("noexec", "EACCES")
OWNER: Final = Refusal("uid", "EACCES")
OWNER_OF_PROCESS: Final = Refusal("uid", "EPERM")
