"""What somebody wants an instance to be: its machine, and under which security it runs.

A definition is one flat table: the machine's keys (see `hypervisor.machine`) and, beside them,
`security_model`, `security_domain` and `autostart`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, cast

from attrs import AttrsInstance, fields, fields_dict, frozen, has

from hypervisor.machine import Machine
from kvmsec.errors import BadDefinition, SecurityRefused
from kvmsec.linux.errors import UntrustedPath
from kvmsec.linux.files import require_trusted
from kvmsec.model import rules
from kvmsec.model.documents import describe_failure, read_document
from kvmsec.model.names import require_name
from kvmsec.model.rules import Rule
from kvmsec.model.security import SecurityModel, require_domain_fits


@frozen(kw_only=True)
class InstanceDefinition:
    """An instance as it was defined; None leaves a choice to the cluster."""

    machine: Machine
    security_model: SecurityModel | None = None
    security_domain: str | None = None
    autostart: bool = False

    @property
    def name(self) -> str:
        return self.machine.name


def read_definition(path: Path) -> dict[str, object]:
    """The table that a file holds (JSON when its name ends so, TOML else), not yet judged.

    Raises BadDefinition, and FileNotFoundError.
    """
    try:
        return read_document(path)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise BadDefinition(str(path), [describe_failure(error)]) from error


def read_kept_definition(path: Path) -> dict[str, object]:
    """A definition that is read because of where it lies, so nobody but root may write there.

    Raises what `read_definition` raises, and BadDefinition for a place that others can write to.
    """
    try:
        require_trusted(path)
    except UntrustedPath as error:
        raise BadDefinition(str(path), [error.told_of(path)], hint=error.hint) from error
    return read_definition(path)


def definition_from(
    document: Mapping[str, object], name: str, *, source: str
) -> InstanceDefinition:
    """Make the definition of the instance `name` of what a file or options hold.

    Raises BadName, and BadDefinition with every fault; `source` names where the document is from.
    """
    from hypervisor.errors import SpecError
    from hypervisor.spec import machine_from  # cattrs: whoever only lists does not pay for it

    require_name("an instance", name)
    own, problems = _own_values(document)
    if document.get("name", name) != name:
        problems.append(f"name: this is the definition of {name}, and must say so or nothing")
    known = {**fields_dict(Machine), **_OWN_KEYS}
    problems += [
        f"{rules.shown_key(key)}: {rules.unknown_key(key, known, 'key')}"
        for key in document
        if key not in known
    ]
    rest = {key: value for key, value in document.items() if key in fields_dict(Machine)}
    try:
        machine = machine_from({**rest, "name": name}, source=source)
    except SpecError as error:
        raise BadDefinition(source, [*problems, *map(str, error.problems)]) from error
    if problems:
        raise BadDefinition(source, problems)
    return InstanceDefinition(machine=machine, **own)


def document_of(definition: InstanceDefinition) -> dict[str, object]:
    """The table that a file with this definition would hold; `definition_from` makes it again.

    What was not chosen is left out, so a reader's own defaults for it hold.
    """
    document = _table_of(definition.machine)
    if definition.security_model is not None:
        document["security_model"] = definition.security_model.value
    if definition.security_domain is not None:
        document["security_domain"] = definition.security_domain
    if definition.autostart:
        document["autostart"] = True
    return document


def _table_of(value: AttrsInstance) -> dict[str, object]:
    """A table without the keys that hold their default: TOML has no null to write."""
    return {
        each.name: _plain(held)
        for each in fields(type(value))
        if (held := getattr(value, each.name)) != each.default
    }


def _plain(value: object) -> object:
    if has(type(value)):
        return _table_of(cast(AttrsInstance, value))
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value


def _domain(value: object) -> str:
    """Which users may be one is for the accounts to say; no account's name is longer (useradd)."""
    domain = rules.text(value)
    if not 1 <= len(domain) <= 256:
        raise ValueError("must be the name of a user")
    return domain


_OWN_KEYS: Final[Mapping[str, Rule[Any]]] = {
    "security_model": rules.security_model,
    "security_domain": _domain,
    "autostart": rules.true_or_false,
}


def _own_values(document: Mapping[str, object]) -> tuple[dict[str, Any], list[str]]:
    """The values of our own keys, and what is wrong with them."""
    values: dict[str, Any] = {}
    problems: list[str] = []
    for key, rule in _OWN_KEYS.items():
        if document.get(key) is None:
            continue
        try:
            values[key] = rule(document[key])
        except ValueError as error:
            problems.append(f"{key}: {error}")
    if not problems and "security_model" in values:
        try:
            require_domain_fits(values["security_model"], values.get("security_domain"))
        except SecurityRefused as error:
            problems.append(f"security_domain: {error.message}")
    return values, problems
