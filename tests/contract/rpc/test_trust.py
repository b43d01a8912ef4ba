"""Who gets an answer over real TLS: every row of the judgement, on both sides of a connection."""

import asyncio
import contextlib
import ssl
from datetime import timedelta
from uuid import UUID

import pytest
from attrs import evolve

from kvmsec.linux.errors import Fault
from kvmsec.pki.certificates import (
    Pair,
    anchors_of,
    fingerprint_of,
    make_certless_pair,
    make_cluster_pair,
)
from kvmsec.pki.contexts import client_context, server_context
from kvmsec.rpc import errors
from kvmsec.rpc import messages as m
from kvmsec.rpc.calls import CALLS, Right
from kvmsec.rpc.client import HttpsTransport
from tests.contract.rpc.trial import (
    CLUSTER,
    FOREIGN,
    LONG_AGO,
    NAMES,
    NODE_1,
    NODE_2,
    NODE_3,
    NOW,
    PAIRS,
    SOON,
    TRUST,
    Node1,
    caller_from,
    pair_of,
    raw,
    run,
    without,
)
from tests.unit.kvmsec.pki.joiners import joining_client_context, joining_server_context

ASK = ("rules.show", m.Nothing())
JOIN = ("join.hello", m.JoinRequest(proof="a" * 64, node_name="master", node_uuid=NODE_2))


async def refused(transport: HttpsTransport, node: Node1) -> errors.Refused:
    """The error that a caller gets; the server's own handler must not have heard of it."""
    with pytest.raises(errors.Refused) as caught:
        await transport.call(*ASK)
    assert node.asked == []
    await transport.close()
    return caught.value


def test_a_candidate_gets_its_answer_under_its_own_name() -> None:
    async def test() -> None:
        async with Node1().running() as node:
            transport = caller_from(node)
            answer = await transport.call(*ASK)
            assert answer == m.Shown(values={"by": "node2"})
            ((caller, name, _),) = node.asked
            assert (caller.name, caller.uuid, name) == ("node2", NODE_2, "rules.show")
            assert caller.fingerprint == fingerprint_of(PAIRS[NODE_2].certificate_pem)
            assert node.refusals == []
            await transport.close()

    run(test)


ROWS = {
    "a foreign cluster's node": (pair_of(NODE_2, cluster=FOREIGN), TRUST, "chain"),
    "an expired certificate": (pair_of(NODE_2, now=LONG_AGO), TRUST, "chain"),
    "one that is not yet valid": (pair_of(NODE_2, now=SOON), TRUST, "chain"),
    "a node that is no member": (PAIRS[NODE_2], evolve(TRUST, members={NODE_1: "node1"}), "name"),
    "a member under another's name": (pair_of(NODE_2, name="node1"), TRUST, "name"),
    "another certificate than the list's": (pair_of(NODE_2), TRUST, "fingerprint"),
    "one on the list under another node": (
        PAIRS[NODE_2],
        evolve(
            TRUST,
            candidates={
                NODE_1: frozenset({fingerprint_of(PAIRS[NODE_2].certificate_pem)}),
                NODE_3: frozenset({"a" * 64}),
            },
        ),
        "fingerprint",
    ),
    "a node that is no candidate": (PAIRS[NODE_3], TRUST, "role"),
    "one that was demoted": (PAIRS[NODE_2], without(NODE_2), "role"),
    "anybody under an empty list": (PAIRS[NODE_2], evolve(TRUST, candidates={}), "fingerprint"),
}


@pytest.mark.parametrize("row", ROWS)
def test_who_is_not_trusted_is_refused_by_the_step_that_fails(row: str) -> None:
    pair, trust, step = ROWS[row]

    async def test() -> None:
        async with Node1(trust=trust).running() as node:
            # A caller of another cluster would not talk to this node either; this one would.
            error = await refused(caller_from(node, pair=pair, trust=None), node)
            assert error.evidence["step"] == step
            assert error.node == "node1"
            assert node.refusals

    run(test)


def test_who_shows_no_certificate_does_not_get_past_the_handshake() -> None:
    async def test() -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.load_verify_locations(cadata=CLUSTER.certificate_pem)
        async with Node1().running() as node:
            transport = HttpsTransport(
                "127.0.0.1", node.port, "node1", NODE_1, lambda: context, lambda: TRUST
            )
            await refused(transport, node)

    run(test)


def test_tls_1_2_is_not_spoken() -> None:
    async def test() -> None:
        context = client_context(PAIRS[NODE_2], CLUSTER.certificate_pem)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        async with Node1().running() as node:
            transport = HttpsTransport(
                "127.0.0.1", node.port, "node1", NODE_1, lambda: context, lambda: TRUST
            )
            with pytest.raises(errors.RemoteFault):
                await transport.call(*ASK)
            assert node.asked == []

    run(test)


@pytest.mark.parametrize("after", [without(NODE_2), evolve(TRUST, candidates={})])
def test_a_demotion_acts_on_a_connection_that_is_open(after: object) -> None:
    async def test() -> None:
        async with Node1().running() as node:
            reader, writer = await raw(node)
            ask = b"POST /rpc/1/rules.show HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n{}"
            writer.write(ask)
            assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
            node.trust = after  # type: ignore[assignment]
            writer.write(ask)
            rest = await reader.read()
            assert b"HTTP/1.1 403" in rest
            assert len(node.asked) == 1
            writer.close()

    run(test)


def test_a_list_that_can_not_be_read_lets_nobody_in() -> None:
    def unreadable() -> None:
        raise Fault("/var/lib/kvmsec/ssconf_master_candidates_certs is missing")

    async def test() -> None:
        async with Node1().running() as node:
            node.server._trust = unreadable
            error = await refused(caller_from(node), node)
            assert "ssconf" not in str(error)
            assert "ssconf" in node.refusals[0].reason

    run(test)


def test_a_right_chain_alone_never_passes_for_the_node_that_was_meant() -> None:
    """The right cluster, the right port, but node3 answers for node1: nothing is told to it."""

    async def test() -> None:
        async with Node1(pair=PAIRS[NODE_3]).running() as node:
            error = await refused(caller_from(node), node)
            assert error.evidence["step"] == "name"
            assert node.refusals == []  # It never heard a request.

    run(test)


def test_a_node_of_a_foreign_cluster_hears_nothing() -> None:
    async def test() -> None:
        pair = pair_of(NODE_1, cluster=FOREIGN)
        both = CLUSTER.certificate_pem + FOREIGN.certificate_pem
        async with Node1(pair=pair, anchors_pem=both).running() as node:
            error = await refused(caller_from(node), node)
            assert error.evidence["step"] == "chain"

    run(test)


def test_a_node_with_an_old_certificate_hears_nothing() -> None:
    async def test() -> None:
        async with Node1(pair=pair_of(NODE_1)).running() as node:
            error = await refused(caller_from(node), node)
            assert error.evidence["step"] == "fingerprint"

    run(test)


def test_both_anchors_are_trusted_during_a_renewal() -> None:
    """Each side with the certificate of one anchor, and both anchors on both sides."""
    new = make_cluster_pair("trial", UUID(int=99), now=NOW)
    both = CLUSTER.certificate_pem + new.certificate_pem
    renewed = pair_of(NODE_1, cluster=new)
    prints = {
        **TRUST.candidates,
        NODE_1: TRUST.candidates[NODE_1] | {fingerprint_of(renewed.certificate_pem)},
    }
    trust = evolve(TRUST, anchors=anchors_of(both), candidates=prints)

    async def test() -> None:
        async with Node1(trust=trust, pair=renewed, anchors_pem=both).running() as node:
            transport = caller_from(node, anchors_pem=both, trust=trust)
            await transport.call(*ASK)
            await transport.close()

    run(test)


def test_a_new_context_is_taken_for_new_connections_while_the_old_go_on() -> None:
    renewed = pair_of(NODE_1)

    async def test() -> None:
        async with Node1().running() as node:
            old, _ = before = await raw(node)
            node.server.use(server_context(renewed, CLUSTER.certificate_pem))
            _, writer = after = await raw(node)
            shown = [
                one[1].get_extra_info("ssl_object").getpeercert(binary_form=True)
                for one in (before, after)
            ]
            assert [fingerprint_of(der) for der in shown] == [
                fingerprint_of(PAIRS[NODE_1].certificate_pem),
                fingerprint_of(renewed.certificate_pem),
            ]
            before[1].write(
                b"POST /rpc/1/rules.show HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n{}"
            )
            assert b"200 OK" in await old.readuntil(b"\r\n\r\n")
            for one in (before, after):
                one[1].close()
            writer.close()

    run(test)


def test_the_common_certificate_counts_only_while_the_node_knows_it() -> None:
    common = make_certless_pair("trial", now=NOW, lifetime=timedelta(hours=2))
    both = CLUSTER.certificate_pem + common.certificate_pem
    known = evolve(TRUST, certless=fingerprint_of(common.certificate_pem))

    async def test() -> None:
        async with Node1(trust=known, pair=common, anchors_pem=both).running() as node:
            transport = caller_from(node, pair=common, anchors_pem=both, trust=known)
            await transport.call(*ASK)
            await transport.close()
            assert node.asked[0][0].uuid is None
            node.asked.clear()
            node.trust = TRUST
            again = caller_from(node, pair=common, anchors_pem=both, trust=known)
            assert (await refused(again, node)).evidence["step"] == "fingerprint"

    run(test)


# Rights ---------------------------------------------------------------------------------------


def test_who_knows_the_token_may_join_a_node_without_a_cluster_and_nothing_else() -> None:
    async def test() -> None:
        async with Node1(trust=None).running() as node:
            node.server.use(joining_server_context(b"s" * 16))
            context = joining_client_context(b"s" * 16)
            transport = HttpsTransport(
                "127.0.0.1", node.port, "node1", NODE_1, lambda: context, lambda: None
            )
            for name, call in CALLS.items():
                if call.right is not Right.JOINER and call.request is m.Nothing:
                    with pytest.raises(errors.Refused, match="belongs to no cluster"):
                        await transport.call(name, m.Nothing())
            assert node.asked == []
            with contextlib.suppress(errors.BadMessage):  # This server's answer is no JoinAnswer.
                await transport.call(*JOIN)
            ((caller, name, _),) = node.asked
            assert (caller.name, caller.uuid, name) == (None, None, "join.hello")
            await transport.close()

    run(test)


def test_who_does_not_know_the_token_can_not_join() -> None:
    async def test() -> None:
        async with Node1(trust=None).running() as node:
            node.server.use(joining_server_context(b"s" * 16))
            context = joining_client_context(b"t" * 16)
            transport = HttpsTransport(
                "127.0.0.1", node.port, "node1", NODE_1, lambda: context, lambda: None
            )
            with pytest.raises(errors.Refused):
                await transport.call(*JOIN)
            assert node.asked == []

    run(test)


def test_a_member_of_a_cluster_is_joined_by_nobody() -> None:
    async def test() -> None:
        async with Node1().running() as node:
            with pytest.raises(errors.Refused, match="already"):
                await caller_from(node).call(*JOIN)
            assert node.asked == []

    run(test)


def test_many_calls_go_over_few_connections() -> None:
    async def test() -> None:
        async with Node1().running() as node:
            transport = caller_from(node)
            await asyncio.gather(*(transport.call(*ASK) for _ in range(100)))
            assert len(node.asked) == 100
            assert node.connections() <= 8
            await transport.close()

    run(test)


def test_a_connection_of_an_earlier_context_is_not_used_again() -> None:
    async def test() -> None:
        contexts = [client_context(PAIRS[NODE_2], CLUSTER.certificate_pem) for _ in range(2)]
        async with Node1().running() as node:
            transport = HttpsTransport(
                "127.0.0.1", node.port, NAMES[NODE_1], NODE_1, lambda: contexts[0], lambda: TRUST
            )
            await transport.call(*ASK)
            (kept,) = transport._https._idle
            contexts.reverse()
            await transport.call(*ASK)
            (now,) = transport._https._idle
            assert now is not kept
            await transport.close()

    run(test)


def test_a_pair_is_one_nodes() -> None:
    """The tests above stand on these certificates being what they say."""
    assert isinstance(PAIRS[NODE_1], Pair)
    assert len({fingerprint_of(pair.certificate_pem) for pair in PAIRS.values()}) == 3
