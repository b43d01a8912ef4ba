"""The nodes of one attempt at a change: whom to ask, and who has fallen silent meanwhile."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Final, TypeVar

from attrs import define, field

from kvmsec.cluster.asking import ASK_S, Answers, ask_all
from kvmsec.cluster.nodes import ClusterNode, Directory, MemberNode
from kvmsec.errors import NotMaster
from kvmsec.linux.errors import Fault
from kvmsec.model.cluster import Cluster
from kvmsec.store import Store
from kvmsec.store.freshness import is_truth

_T = TypeVar("_T")

ATTEMPTS: Final = 20
"""A lost attempt is a rival's success, so this bounds a livelock only, not a busy cluster."""


@define
class Team:
    """This node, the master, and every other member; those that are `silent` are asked no more."""

    here: ClusterNode
    others: tuple[MemberNode, ...]
    silent: dict[str, str] = field(factory=dict)

    @classmethod
    def of(cls, store: Store, directory: Directory, cluster: Cluster) -> "Team":
        """The members of `cluster`. Raises NotMaster where this node isn't the master."""
        require_master(store, cluster)
        others = (node for node in cluster.nodes if node.uuid != cluster.master)
        return cls(directory.here, tuple(map(directory.node, others)))

    @property
    def listening(self) -> tuple[MemberNode, ...]:
        return tuple(node for node in self.others if node.name not in self.silent)

    @property
    def is_alone(self) -> bool:
        return not self.others

    async def ask(
        self, call: Callable[[ClusterNode], Awaitable[_T]], *, deadline_s: float = ASK_S
    ) -> Mapping[str, _T]:
        """Ask this node and all that listen, at once; who doesn't answer is `silent` from then on.

        Raises the refusal of a node, with the others' as notes.
        """
        # This node last: what it does in place would keep the loop from asking the others.
        nodes: tuple[ClusterNode, ...] = (*self.listening, self.here)
        return self._heard(await ask_all(nodes, call, deadline_s=deadline_s))

    async def tell(
        self, call: Callable[[MemberNode], Awaitable[_T]], *, deadline_s: float = ASK_S
    ) -> Mapping[str, _T]:
        """As `ask`, but of the others alone."""
        return self._heard(await ask_all(self.listening, call, deadline_s=deadline_s))

    def _heard(self, answers: Answers[_T]) -> Mapping[str, _T]:
        self.silent.update(answers.silent)
        if answers.refused:
            raise refusal_of(answers.refused, is_alone=self.is_alone)
        return answers.answered


def require_master(store: Store, cluster: Cluster) -> None:
    """Raises NotMaster where this node only has a copy of `cluster`."""
    if not is_truth(cluster, store.identity()):
        raise NotMaster(cluster.master_member.name)


def refusal_of(refused: Mapping[str, Fault | OSError], *, is_alone: bool) -> Fault | OSError:
    """The first refusal, the others' words as its notes."""
    (name, first), *others = refused.items()
    if not is_alone and name not in str(first):
        first.add_note(f"this is what {name} said")
    for other, error in others:
        first.add_note(f"{other}: {error}")
    return first
