"""An attack is refused by the lock that the table names, and works where nothing is locked."""

from collections.abc import Callable
from typing import Final

import pytest

from tests.attacks.assault import CONTROL, Run
from tests.attacks.attack import Attack, Encounter
from tests.attacks.attacker import Answer

pytestmark = pytest.mark.kvm

MODELS: Final = ("pool", "user", "none")
BACKENDS: Final = ("nftables", "iptables")
RUNS: Final = (
    *(Run(model, backend) for model in MODELS for backend in BACKENDS),
    *(Run(model, "nftables", "no seccomp") for model in MODELS),
    *(Run(model, "nftables", "the network namespace alone") for model in ("pool", "user")),
    *(
        Run(model, backend, "the packet rules alone")
        for model in ("pool", "user")
        for backend in BACKENDS
    ),
    Run("pool", "nftables", "the uid alone"),
)

Carry = Callable[[Run], dict[str, Answer]]


@pytest.mark.parametrize(
    ("run", "attack"),
    [pytest.param(run, attack, id=f"{run}-{attack.name}") for run in RUNS for attack in run.rows],
)
def test_it_is_refused(run: Run, attack: Attack | Encounter, carried_out: Carry) -> None:
    wanted = attack.expected(run.model, run.locks)
    assert wanted is not None
    answer = carried_out(run)[attack.name]
    said = f"{answer.word} {answer.found}; wanted: {set(wanted.answers)} by {wanted.lock}"
    assert answer.word in wanted.answers, said


@pytest.mark.parametrize("attack", [pytest.param(one, id=one.name) for one in CONTROL.rows])
def test_it_works_where_nothing_refuses_it(attack: Attack | Encounter, carried_out: Carry) -> None:
    """So that no attack is refused for being a broken one."""
    wanted = attack.expected(CONTROL.model, CONTROL.locks)
    assert wanted is not None
    answer = carried_out(CONTROL)[attack.name]
    unless = attack.control.unless if isinstance(attack, Attack) else None
    if unless is not None and answer.word == unless.answer:
        assert unless.is_so(), f"{answer}: it is not that {unless.reason}"
        return
    assert answer.word in wanted.answers, answer
