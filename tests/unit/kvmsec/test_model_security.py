"""Which security model an instance starts under, and which user it may name."""

import pytest

from kvmsec.errors import SecurityRefused
from kvmsec.model.security import Security, SecurityModel, decide_security

NONE, USER, POOL = SecurityModel.NONE, SecurityModel.USER, SecurityModel.POOL


def decide(
    model: SecurityModel | None = None,
    domain: str | None = None,
    *,
    default: SecurityModel = POOL,
    pool_is_empty: bool = False,
    weakest: SecurityModel = NONE,
) -> Security:
    return decide_security(
        model, domain, default=default, pool_is_empty=pool_is_empty, weakest=weakest
    )


@pytest.mark.parametrize("default", [NONE, POOL])
def test_an_instance_that_says_nothing_gets_the_clusters_model(default: SecurityModel) -> None:
    assert decide(default=default) == Security(default, None)


def test_an_instance_may_override_it_either_way() -> None:
    assert decide(NONE).model is NONE
    assert decide(POOL, default=NONE).model is POOL
    assert decide(USER, "web") == Security(USER, "web")


def test_user_wants_a_domain_and_the_others_refuse_one() -> None:
    for model, domain in [(USER, None), (NONE, "web"), (POOL, "web")]:
        with pytest.raises(SecurityRefused) as caught:
            decide(model, domain)
        assert caught.value.hint is not None


def test_a_domain_alone_makes_no_user_model_of_the_default() -> None:
    with pytest.raises(SecurityRefused):
        decide(None, "web")
    assert decide(None, "web", default=USER) == Security(USER, "web")


@pytest.mark.parametrize(
    ("weakest", "accepted"), [(NONE, {NONE, USER, POOL}), (USER, {USER, POOL}), (POOL, {POOL})]
)
def test_nothing_weaker_than_the_node_accepts_is_started(
    weakest: SecurityModel, accepted: set[SecurityModel]
) -> None:
    for model in SecurityModel:
        domain = "web" if model is USER else None
        if model in accepted:
            assert decide(model, domain, weakest=weakest).model is model
        else:
            with pytest.raises(SecurityRefused, match=f"weaker than {weakest.value}"):
                decide(model, domain, weakest=weakest)


def test_a_default_below_what_the_node_accepts_is_refused_rather_than_raised() -> None:
    with pytest.raises(SecurityRefused):
        decide(default=NONE, weakest=USER)


def test_pool_without_a_pool_is_refused_rather_than_weakened() -> None:
    with pytest.raises(SecurityRefused, match="uid pool"):
        decide(POOL, pool_is_empty=True)
