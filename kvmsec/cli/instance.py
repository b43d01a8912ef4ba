"""`kvmsec instance`: start, stop and look at instances."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from kvmsec.cli.failures import FAILED, WrongUsage
from kvmsec.cli.output import (
    complain,
    duration,
    print_facts,
    print_json,
    print_table,
    say,
    shown_line,
    warn,
)
from kvmsec.cli.params import (
    DISK,
    INSTANCE_NAME,
    NIC,
    NODE_NAME,
    PATH,
    PERCENT,
    SECONDS,
    SECURITY_MODEL,
    WHOLE_NUMBER,
    json_option,
)
from kvmsec.cli.session import Session, pass_session

if TYPE_CHECKING:
    from kvmsec.agent import InstanceInfo
    from kvmsec.cli.session import Reach
    from kvmsec.cluster.asking import Answers

_KEYS: Final = (
    *("name", "state", "reason", "pid", "uid", "user", "security_model", "accelerator"),
    *("memory_mib", "vcpus", "started_at", "resident_bytes", "cpu_s", "autostart"),
)
"""What `list` says of an instance in JSON; `info` says more."""

_HEADINGS: Final = (
    *("name", "state", "pid", "uid", "user", "model", "accelerator", "memory", "uptime"),
)

_LIMITS: Final = ("cpu_weight", "cpu_quota_percent", "io_weight")
"""The options that a definition has in its table `limits`."""

_name_argument = click.argument("name", type=INSTANCE_NAME)
_node_option = click.option(
    "--node", "node_name", type=NODE_NAME, metavar="HOST", help="On this member of the cluster."
)


@click.group
def instance() -> None:
    """Instances of this node, and of the others of its cluster."""


@instance.command
@_name_argument
@click.option("--spec", type=PATH, metavar="FILE", help="A definition, TOML or JSON; options win.")
@click.option("--memory", "memory_mib", type=WHOLE_NUMBER, metavar="MIB", help="Memory in MiB.")
@click.option(
    "--hugepages", type=click.Choice(["2M", "1G"]), help="Memory of huge pages of this size."
)
@click.option("--vcpus", type=WHOLE_NUMBER, metavar="N", help="Virtual CPUs.")
@click.option("--machine", help="pc, q35, microvm or a version of one.")
@click.option("--cpu", help="The CPU's model.")
@click.option(
    "--disk",
    "disks",
    type=DISK,
    multiple=True,
    metavar="PATH[,format=…,readonly=…]",
    help="A disk image or block device, with any key of a definition's; may be repeated.",
)
@click.option(
    "--nic",
    "nics",
    type=NIC,
    multiple=True,
    metavar="tap=…|bridge=…[,mac=…]",
    help="A network card, with any key of a definition's; may be repeated.",
)
@click.option("--firmware", type=PATH, metavar="PATH", help="What the machine boots from.")
@click.option("--kernel", type=PATH, metavar="PATH", help="A Linux kernel to boot.")
@click.option("--initrd", type=PATH, metavar="PATH", help="Its initial RAM disk.")
@click.option("--append", metavar="TEXT", help="Its command line.")
@click.option(
    "--cpu-weight",
    type=WHOLE_NUMBER,
    metavar="N",
    help="Its share of CPU time, 1 to 10000; 100 is everybody's.",
)
@click.option(
    "--cpu-quota",
    "cpu_quota_percent",
    type=PERCENT,
    metavar="PERCENT",
    help="The most CPU time; 100 is one CPU.",
)
@click.option(
    "--io-weight",
    type=WHOLE_NUMBER,
    metavar="N",
    help="Its share of disk I/O, 1 to 10000; 100 is everybody's.",
)
@click.option(
    "--accel",
    "accelerator",
    type=click.Choice(["kvm", "tcg", "auto"]),
    help="Hardware virtualization (kvm, unless told) or emulation, which is no boundary.",
)
@click.option(
    "--security-model",
    type=SECURITY_MODEL,
    help="Whose uid it gets: root's, one user's or one of the pool; the cluster's unless told.",
)
@click.option("--security-domain", metavar="USER", help="The user to run as under `user`.")
@click.option("--qemu", type=PATH, metavar="PATH", help="The QEMU to run.")
@_node_option
@pass_session
def start(
    session: Session, /, name: str, spec: Path | None, node_name: str | None, **options: Any
) -> None:
    """Start the instance NAME.

    It is what /etc/kvmsec/instances/NAME.toml says, or the file of --spec; options win over both,
    and are enough where there is no file. Relative paths are taken from the working directory.

    With --node the definition is this node's, and the paths in it are the other node's, within
    what its [remote] settings allow.
    """
    session.require_root()
    from kvmsec.cli.definition import definition_of

    definition = definition_of(name, session.paths, spec, _as_text(options))
    tell_start(session.run_on(node_name, lambda node: node.start(definition)))


def tell_start(info: InstanceInfo) -> None:
    """What was started, and what a person should know about it."""
    user = f" ({info.user})" if info.user else ""
    say(
        shown_line(
            f"{info.name} {info.state.value}: pid {info.pid}, uid {info.uid}{user}, "
            f"accelerator {info.accelerator}"
        )
    )
    _warn_about(info)


@instance.command
@pass_session
def autostart(session: Session) -> None:
    """Start every instance with `autostart = true` that does not run; a boot does this.

    One that fails keeps no other from being started; the exit status is 1 then.
    """
    from kvmsec.cli.autostart import start_all

    failed = session.run(lambda node: start_all(session, node))
    if failed:
        complain(f"not started: {', '.join(failed)}", "see what is said of each above")
        raise click.exceptions.Exit(FAILED)


def _as_text(options: dict[str, Any]) -> dict[str, object]:
    """The options as a file would have them."""
    limits = {key: options.pop(key) for key in _LIMITS}
    given = {key: value for key, value in limits.items() if value is not None}
    plain = {
        key: str(value) if isinstance(value, Path) else value for key, value in options.items()
    }
    return {**plain, "limits": given or None}


def _warn_about(info: InstanceInfo) -> None:
    if info.security_model == "none":
        warn(f"{info.name} runs as root (security model none): who breaks out of it is root here")
    if info.accelerator == "tcg":
        warn(f"{info.name} is emulated (tcg), which QEMU does not hold to be a security boundary")


@instance.command
@_name_argument
@click.option(
    "--timeout",
    "timeout_s",
    type=SECONDS,
    default=60.0,
    metavar="S",
    help="How long the guest may take to power down (60 s); then it is killed.",
)
@click.option("--force", is_flag=True, help="Kill it at once.")
@_node_option
@pass_session
def stop(session: Session, name: str, timeout_s: float, force: bool, node_name: str | None) -> None:
    """Stop the instance NAME; its uid is released once it is clean."""
    info = session.run_on(node_name, lambda node: node.stop(name, timeout_s=timeout_s, force=force))
    say(shown_line(_state_of(info)))


@instance.command
@_name_argument
@_node_option
@pass_session
def reboot(session: Session, name: str, node_name: str | None) -> None:
    """Reset the guest; process and uid stay."""
    session.run_on(node_name, lambda node: node.reboot(name))
    say(f"{name} was reset")


@instance.command("list")
@_node_option
@click.option("--all-nodes", is_flag=True, help="Of every member, all asked at once.")
@json_option
@pass_session
def list_instances(session: Session, node_name: str | None, all_nodes: bool, as_json: bool) -> None:
    """Every instance that runs, ended unasked, or has a definition."""
    if node_name is not None and all_nodes:
        raise WrongUsage("--node and --all-nodes can't go together")
    if all_nodes:
        _list_all(session, as_json=as_json)
        return
    infos = session.run_on(node_name, lambda node: node.list())
    if as_json:
        print_json([_document(info) for info in infos])
        return
    print_table(_HEADINGS, map(_row, infos))


def _list_all(session: Session, *, as_json: bool) -> None:
    """A node that didn't answer has a line that says so, in JSON with `name` null."""

    async def ask(reach: Reach) -> Answers[tuple[InstanceInfo, ...]]:
        from kvmsec.cli.remote import list_all

        return await list_all(session.store, reach)

    answers = session.run_reaching(ask)
    found = sorted(answers.answered.items())
    lost = sorted([*answers.silent.items(), *answers.refused.items()])
    if as_json:
        nobody = dict.fromkeys(_KEYS)
        print_json(
            [{"node": name, **_document(one)} for name, infos in found for one in infos]
            + [
                {"node": name, **nobody, "state": "unknown", "reason": f"no answer: {reason}"}
                for name, reason in lost
            ]
        )
        return
    rows: list[tuple[object, ...]] = [(name, *_row(one)) for name, infos in found for one in infos]
    rows += [(name, None, "no answer", *(None,) * (len(_HEADINGS) - 2)) for name, _ in lost]
    print_table(("node", *_HEADINGS), rows)
    for name, reason in lost:
        warn(f"{name} {'refuses' if name in answers.refused else 'did not answer'}: {reason}")


def _row(info: InstanceInfo) -> tuple[object, ...]:
    return (
        info.name,
        f"{info.state.value} ({info.reason})" if info.reason else info.state.value,
        *(info.pid, info.uid, info.user, info.security_model, info.accelerator),
        None if info.memory_mib is None else f"{info.memory_mib} MiB",
        _uptime(info),
    )


@instance.command
@_name_argument
@_node_option
@json_option
@pass_session
def info(session: Session, name: str, node_name: str | None, as_json: bool) -> None:
    """All that is known of the instance NAME."""
    found = session.run_on(node_name, lambda node: node.info(name))
    if as_json:
        print_json({**found.details, **_document(found)})
        return
    print_facts(_facts(found))


def _facts(info: InstanceInfo) -> dict[str, object]:
    """All that is known, in the words of a person."""
    import shlex

    facts = {**_document(info), "uptime": _uptime(info), **info.details}
    if info.resident_bytes is not None:
        facts["resident_bytes"] = f"{info.resident_bytes} ({info.resident_bytes / 2**20:.1f} MiB)"
    if argv := facts.get("command_line"):
        facts["command_line"] = shlex.join(map(str, argv))
    return facts


def _document(info: InstanceInfo) -> dict[str, object]:
    return {key: getattr(info, key) for key in _KEYS}


def _state_of(info: InstanceInfo) -> str:
    reason = f" ({info.reason})" if info.reason else ""
    return f"{info.name} {info.state.value}{reason}"


def _uptime(info: InstanceInfo) -> str | None:
    """How long it has been running; None when it is not."""
    if info.pid is None or info.started_at is None:
        return None
    from datetime import UTC, datetime

    return duration((datetime.now(UTC) - info.started_at).total_seconds())


@instance.command
@_name_argument
@click.option("--follow", "-f", is_flag=True, help="Go on until the instance ends.")
@_node_option
@json_option
@pass_session
def log(session: Session, name: str, follow: bool, node_name: str | None, as_json: bool) -> None:
    """What kvmsec, QEMU and the serial line of the instance NAME said."""
    from kvmsec.cli import following

    if follow and node_name is not None:
        raise WrongUsage("--follow and --node can't go together", hint="run it on the node itself")
    if follow and as_json:
        raise WrongUsage("--follow and --json can't go together")
    if as_json:
        said = session.run_on(node_name, lambda node: node.log(name))
        print_json({source: getattr(said, source) for source in ("kvmsec", "qemu", "serial")})
        return
    show = following.follow_log if follow else following.show_log
    session.run_on(node_name, lambda node: show(node, name), is_local=follow)


@instance.command
@_name_argument
@pass_session
def console(session: Session, name: str) -> None:
    """Attach this terminal to the serial line of NAME; Ctrl-] leaves."""
    from kvmsec.cli.console import run_console

    session.run(lambda node: run_console(node, name), is_local=True)
