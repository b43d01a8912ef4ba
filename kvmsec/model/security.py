"""Security models: whose uid an instance gets, and what each of them asks for."""

from enum import Enum

from attrs import frozen

from kvmsec.errors import SecurityRefused


class SecurityModel(Enum):
    """As whom an instance runs, the weakest first."""

    NONE = "none"
    USER = "user"
    POOL = "pool"

    def is_weaker_than(self, other: "SecurityModel") -> bool:
        order = list(SecurityModel)
        return order.index(self) < order.index(other)


@frozen
class Security:
    """What an instance starts under: the model, and the user that `user` wants (None else)."""

    model: SecurityModel
    domain: str | None


def decide_security(
    model: SecurityModel | None,
    domain: str | None,
    *,
    default: SecurityModel,
    pool_is_empty: bool,
    weakest: SecurityModel,
) -> Security:
    """What an instance starts under, from its own wishes, its cluster's and its node's.

    `model` and `domain` are the instance's (None: not said), `default` is the cluster's model and
    `weakest` the weakest that the node accepts. Raises SecurityRefused; nothing is ever replaced
    by a weaker model.
    """
    chosen = model or default
    if chosen.is_weaker_than(weakest):
        raise SecurityRefused(
            f"this node accepts no security model weaker than {weakest.value}, and this is "
            f"{chosen.value}",
            hint="choose another with --security-model, or change security.weakest_model in "
            "kvmsec.toml",
        )
    require_domain_fits(chosen, domain)
    if chosen is SecurityModel.POOL and pool_is_empty:
        raise SecurityRefused(
            "the security model pool wants a uid pool, and the cluster has none",
            hint="set one with `kvmsec cluster modify --uid-pool POOL`",
        )
    return Security(chosen, domain)


def require_domain_fits(model: SecurityModel, domain: str | None) -> None:
    """`user` wants a security domain, the others refuse one. Raises SecurityRefused."""
    if model is SecurityModel.USER and domain is None:
        raise SecurityRefused(
            "the security model user wants a security domain: the user to run as",
            hint="name an unprivileged user with --security-domain",
        )
    if model is not SecurityModel.USER and domain is not None:
        raise SecurityRefused(
            f"the security model {model.value} takes no security domain",
            hint="leave the security domain out, or choose the security model user",
        )
