"""Whether this node takes an instance at all: decided before anything is made for it."""

from datetime import UTC, datetime

from kvmsec.errors import BadDefinition
from kvmsec.model.instance import InstanceDefinition
from kvmsec.model.security import Security, SecurityModel, decide_security
from kvmsec.node.host import Host
from kvmsec.node.limits import problems_of
from kvmsec.store.freshness import require_confirmed


def admit(host: Host, definition: InstanceDefinition) -> Security:
    """Under which security an instance starts here.

    Raises SecurityRefused, BadDefinition for more than the node's limits allow, and StaleCopy
    where a uid would be drawn from a state that the master has not confirmed for too long.
    """
    _require_within_limits(host, definition)
    cluster, revision = host.store.load()
    security = decide_security(
        definition.security_model,
        definition.security_domain,
        default=cluster.default_model if cluster else SecurityModel.NONE,
        pool_is_empty=not (cluster and cluster.uid_pool),
        weakest=host.config.security.weakest_model,
    )
    if cluster is not None and security.model is SecurityModel.POOL:
        require_confirmed(
            cluster,
            revision,
            host.store.identity(),
            now=datetime.now(UTC),
            copy_valid_s=host.config.cluster.copy_valid_s,
        )
    return security


def _require_within_limits(host: Host, definition: InstanceDefinition) -> None:
    machine, limits = definition.machine, host.config.limits
    asked = {
        "memory_mib": (machine.memory_mib, limits.max_memory_mib),
        "vcpus": (machine.vcpus, limits.max_vcpus),
    }
    problems = [
        f"{what}: {wanted} is more than the {most} that this node allows an instance"
        for what, (wanted, most) in asked.items()
        if most is not None and wanted > most
    ]
    problems += problems_of(machine.limits, limits)
    if problems:
        raise BadDefinition(machine.name, problems, hint="see [limits] in kvmsec.toml")
