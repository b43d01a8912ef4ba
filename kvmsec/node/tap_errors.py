"""What can be wrong with a guest's network on the node; each error names the interface."""

from collections.abc import Sequence

from kvmsec.errors import KvmsecError


class TapError(KvmsecError):
    """The root of what goes wrong with taps."""


class TapUnusable(TapError):
    """An existing tap that can't be an instance's, or a tap that could not be made."""

    def __init__(self, name: str, problem: str, *, hint: str | None = None) -> None:
        super().__init__(f"the tap {name} {problem}", hint=hint)
        self.name = name
        self.problem = problem


class BridgeUnusable(TapError):
    """No bridge to plug a tap into."""

    def __init__(self, name: str, problem: str, *, hint: str) -> None:
        super().__init__(f"the bridge {name} {problem}", hint=hint)
        self.name = name
        self.problem = problem


class NodeDeviceMissing(TapError):
    """The kernel of this node does not have a device that a NIC needs."""

    def __init__(self, path: str, problem: str, *, hint: str) -> None:
        super().__init__(f"{path}: {problem}", hint=hint)
        self.path = path


class TapsNotPutBack(TapError):
    """Some taps could not be removed or put back as they were; the others were."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__(
            f"not all taps could be taken back: {'; '.join(problems)}",
            hint="end what uses them; the next kvmsec command that acts tries again",
        )
        self.problems = tuple(problems)
