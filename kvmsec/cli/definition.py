"""From `instance start`'s file and options to a definition; options win."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from kvmsec.cli.failures import WrongUsage

if TYPE_CHECKING:
    from kvmsec.errors import BadDefinition
    from kvmsec.model.instance import InstanceDefinition
    from kvmsec.paths import Paths


def definition_of(
    name: str, paths: Paths, spec: Path | None, options: Mapping[str, object]
) -> InstanceDefinition:
    """What is to be started: the file (the kept definition unless another is named), then options.

    Options alone are enough where there is no file. Raises BadDefinition, and WrongUsage for
    options that make no machine by themselves.
    """
    given = {key: value for key, value in options.items() if value is not None and value != ()}
    path = paths.definition(name)
    if spec is not None:
        return _from_file(name, spec, _read_spec(spec), given)
    kept = _read_kept(path)
    if kept is not None:
        return _from_file(name, path, kept, given)
    if given:
        return _from_options(name, given)
    raise _nothing_said(path, is_known=paths.instance(name).directory.exists())


def _from_file(
    name: str, path: Path, document: Mapping[str, object], given: Mapping[str, object]
) -> InstanceDefinition:
    from hypervisor.spec import merge
    from kvmsec.model.instance import definition_from

    source = f"{path} and the options" if given else str(path)
    return definition_from(merge(document, given), name, source=source)


def _read_spec(path: Path) -> dict[str, object]:
    from kvmsec.errors import BadDefinition
    from kvmsec.model.instance import read_definition

    try:
        return read_definition(path)
    except FileNotFoundError as error:
        hint = "--spec wants a definition, TOML or JSON; an image is named with --disk"
        raise BadDefinition(str(path), [error.strerror or "not there"], hint=hint) from error


def _read_kept(path: Path) -> dict[str, object] | None:
    from kvmsec.model.instance import read_kept_definition

    try:
        return read_kept_definition(path)
    except FileNotFoundError:
        return None


def _nothing_said(path: Path, *, is_known: bool) -> BadDefinition:
    """Options are not kept: an instance that runs by them alone can't be started by its name."""
    from kvmsec.errors import BadDefinition

    hint = "write it, or say what to start: --spec FILE, or options such as --disk PATH"
    if is_known:
        hint = f"{path.stem} was started without it: `kvmsec instance info {path.stem}`; or {hint}"
    return BadDefinition(str(path), ["there is no such file"], hint=hint)


def _from_options(name: str, given: Mapping[str, object]) -> InstanceDefinition:
    from kvmsec.errors import BadDefinition
    from kvmsec.model.instance import definition_from

    try:
        return definition_from(given, name, source="the options")
    except BadDefinition as error:
        raise WrongUsage(error.message, error.hint) from error
