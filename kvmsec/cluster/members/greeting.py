"""The master's side of a join: each message with its proof, each answer's proof checked."""

from typing import Final, Protocol
from uuid import UUID

from attrs import frozen

from kvmsec.cluster.members.proofs import said_in_admission, said_in_answer, said_in_hello
from kvmsec.pki.joining import Invitation, JoinRole, check_proof, proof
from kvmsec.rpc.messages import AdmitRequest, JoinAnswer, JoinRequest, NodeInfo, State

_NO_PROOF: Final = "0" * 64


class Doorway(Protocol):
    """An invited node, over a connection whose certificates only the token's secret could make."""

    async def hello(self, request: JoinRequest) -> JoinAnswer: ...

    async def admit(self, request: AdmitRequest) -> NodeInfo: ...

    async def fingerprints(self) -> tuple[str, str]:
        """Of this side's temporary certificate, and of the one that the node has shown."""


@frozen
class Greeter:
    """`kvmsec.cluster.nodes.JoiningNode`. Every call raises BadToken for a proof that is wrong."""

    doorway: Doorway
    invitation: Invitation

    async def hello(self, name: str, uuid: UUID) -> str:
        request = JoinRequest(proof=_NO_PROOF, node_name=name, node_uuid=uuid)
        shown = await self._proof(JoinRole.MASTER_HELLO, said_in_hello(request))
        answer = await self.doorway.hello(JoinRequest(proof=shown, node_name=name, node_uuid=uuid))
        own, other = await self.doorway.fingerprints()
        check_proof(
            answer.proof,
            self.invitation.secret,
            role=JoinRole.NODE_HELLO,
            master_fingerprint=own,
            node_fingerprint=other,
            anchor_fingerprint=self.invitation.anchor_fingerprint,
            said=said_in_answer(answer.signing_request),
        )
        return answer.signing_request

    async def admit(self, anchors: str, certificate: str, state: State) -> NodeInfo:
        request = AdmitRequest(
            proof=_NO_PROOF, anchors=anchors, certificate=certificate, state=state
        )
        shown = await self._proof(JoinRole.MASTER_ADMIT, said_in_admission(request))
        return await self.doorway.admit(
            AdmitRequest(proof=shown, anchors=anchors, certificate=certificate, state=state)
        )

    async def _proof(self, role: JoinRole, said: bytes) -> str:
        own, other = await self.doorway.fingerprints()
        return proof(
            self.invitation.secret,
            role=role,
            master_fingerprint=own,
            node_fingerprint=other,
            anchor_fingerprint=self.invitation.anchor_fingerprint,
            said=said,
        )
