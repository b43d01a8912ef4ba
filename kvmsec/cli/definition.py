"""From `instance start`'s file and options to a definition; options win."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from kvmsec.cli.failures import WrongUsage

if TYPE_CHECKING:
    from kvmsec.model.instance import InstanceDefinition
    from kvmsec.paths import Paths


def definition_of(
    name: str, paths: Paths, spec: Path | None, options: Mapping[str, object]
) -> InstanceDefinition:
    """What is to be started; the kept definition when neither a file nor an option was given.

    Raises BadDefinition, OSError for a file that can't be read, and WrongUsage for options that
    make no machine by themselves.
    """
    given = {key: value for key, value in options.items() if value is not None and value != ()}
    if spec is not None:
        return _from_file(name, spec, given)
    return _from_options(name, given) if given else _kept(name, paths)


def _from_file(name: str, spec: Path, given: Mapping[str, object]) -> InstanceDefinition:
    from hypervisor.spec import merge
    from kvmsec.model.instance import definition_from, read_definition

    source = f"{spec} and the options" if given else str(spec)
    return definition_from(merge(read_definition(spec), given), name, source=source)


def _from_options(name: str, given: Mapping[str, object]) -> InstanceDefinition:
    from kvmsec.errors import BadDefinition
    from kvmsec.model.instance import definition_from

    try:
        return definition_from(given, name, source="the options")
    except BadDefinition as error:
        raise WrongUsage(error.message, error.hint) from error


def _kept(name: str, paths: Paths) -> InstanceDefinition:
    from kvmsec.errors import BadDefinition
    from kvmsec.model.instance import definition_from, read_kept_definition

    path = paths.definition(name)
    try:
        document = read_kept_definition(path)
    except FileNotFoundError:
        raise BadDefinition(
            str(path),
            ["there is no such file"],
            hint="write it, or say what to start: --spec FILE, or options such as --disk PATH",
        ) from None
    return definition_from(document, name, source=str(path))
