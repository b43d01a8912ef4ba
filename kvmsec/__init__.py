"""KVM guests that do not trust each other, each under a uid of its own that can reach nothing.

`from kvmsec import Node` is the library's face; nothing is loaded before it is used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvmsec.agent import Event, InstanceInfo, InstanceState
    from kvmsec.model.instance import InstanceDefinition, definition_from
    from kvmsec.node.local import LocalNode as Node

_PLACES = {
    "Event": ("kvmsec.agent", "Event"),
    "InstanceDefinition": ("kvmsec.model.instance", "InstanceDefinition"),
    "InstanceInfo": ("kvmsec.agent", "InstanceInfo"),
    "InstanceState": ("kvmsec.agent", "InstanceState"),
    "Node": ("kvmsec.node.local", "LocalNode"),
    "definition_from": ("kvmsec.model.instance", "definition_from"),
}

__all__ = [
    "Event",
    "InstanceDefinition",
    "InstanceInfo",
    "InstanceState",
    "Node",
    "definition_from",
]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    try:
        module, attribute = _PLACES[name]
    except KeyError:
        raise AttributeError(f"module 'kvmsec' has no attribute {name!r}") from None
    return getattr(import_module(module), attribute)
