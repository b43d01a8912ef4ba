"""Which instances a boot starts, and how each of these starts went."""

from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Final

from attrs import frozen

from kvmsec.agent import Agent, InstanceInfo, InstanceState
from kvmsec.cluster.asking import kind_of
from kvmsec.errors import AlreadyRunning, BadDefinition, BadName
from kvmsec.linux.errors import Fault
from kvmsec.model.instance import InstanceDefinition, definition_from, read_kept_definition
from kvmsec.paths import Paths

_LIVES: Final = (InstanceState.RUNNING,)


@frozen
class Attempt:
    """What became of one instance: it was `started`, ran already (neither), or `failed`."""

    name: str
    started: InstanceInfo | None = None
    failed: Exception | None = None


def find_wanted(paths: Paths) -> Iterator[tuple[str, InstanceDefinition | Exception]]:
    """The kept definitions with `autostart = true`, by name, and those that can't be read.

    One whose table can be read and doesn't ask for it is left out, whatever else is wrong there.
    """
    for path in sorted(paths.definitions.glob("*.toml")):
        try:
            document = read_kept_definition(path)
            if document.get("autostart", False) is not False:
                yield path.stem, definition_from(document, path.stem, source=str(path))
        except FileNotFoundError:
            continue  # It was removed meanwhile.
        except (BadDefinition, BadName, OSError) as error:
            yield path.stem, error


async def start_wanted(
    agent: Agent, wanted: Mapping[str, InstanceDefinition | Exception]
) -> AsyncIterator[Attempt]:
    """Start those that don't run, one after the other; one that fails keeps no other from it."""
    running = {one.name for one in await agent.list() if one.state in _LIVES}
    for name, definition in wanted.items():
        if isinstance(definition, Exception):
            yield Attempt(name, failed=definition)
        elif name in running:
            yield Attempt(name)
        else:
            yield await _attempt(agent, definition)


async def _attempt(agent: Agent, definition: InstanceDefinition) -> Attempt:
    try:
        return Attempt(definition.name, started=await agent.start(definition))
    except (Fault, OSError) as error:
        if kind_of(error) == AlreadyRunning.__name__:
            return Attempt(definition.name)  # Somebody started it meanwhile.
        return Attempt(definition.name, failed=error)
