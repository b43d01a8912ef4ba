"""Write the man pages and the shells' completions of `kvmsec`, from what it says of itself.

python packaging/documents.py DIRECTORY     which becomes /usr/share
"""

import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Final

import click
from click.shell_completion import get_completion_class

from kvmsec.cli.main import kvmsec

_COMPLETIONS: Final = {
    "bash": "bash-completion/completions/kvmsec",
    "zsh": "zsh/vendor-completions/_kvmsec",
    "fish": "fish/vendor_completions.d/kvmsec.fish",
}
"""Where Debian has each shell look, below /usr/share."""

_EXIT_STATUS: Final = (
    ("0", "Done."),
    ("1", "It failed; what was wrong is on stderr, and where there is one a hint what to do."),
    ("2", "Wrong usage."),
    ("3", "A check found an error, or an audit a score above its threshold."),
)
_FILES: Final = (
    ("/etc/kvmsec/kvmsec.toml", "The node's settings."),
    ("/etc/kvmsec/instances/NAME.toml", "An instance's definition."),
    ("/var/lib/kvmsec", "The cluster's state, and which uids rest or are quarantined."),
    ("/run/kvmsec", "What runs, and who holds which uid and image."),
    ("/var/log/kvmsec", "What kvmsec and the instances said."),
)


def write_documents(share: Path) -> None:
    """Write every page and completion below `share`."""
    for name, text in {**man_pages(), **completions()}.items():
        path = share / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def completions() -> Mapping[str, str]:
    """What each shell reads when it is to complete a command line, by path below /usr/share."""
    found = {}
    for shell, place in _COMPLETIONS.items():
        kind = get_completion_class(shell)
        assert kind is not None, shell
        completion = kind(kvmsec, {}, "kvmsec", "_KVMSEC_COMPLETE")
        # Not `source()`: for bash that runs bash, to find out how old it is.
        found[place] = completion.source_template % completion.source_vars()
    return found


def man_pages() -> Mapping[str, str]:
    """kvmsec(1), and a page a noun with all its verbs, by path below /usr/share."""
    context = click.Context(kvmsec, info_name="kvmsec", **kvmsec.context_settings)
    nouns = {name: kvmsec.get_command(context, name) for name in kvmsec.list_commands(context)}
    pages = {"kvmsec": "".join(_top_page(context, nouns))}
    for name, noun in nouns.items():
        assert noun is not None, name
        pages[f"kvmsec-{name}"] = "".join(_noun_page(context, name, noun))
    return {f"man/man1/{name}.1": text for name, text in pages.items()}


# The pages: man(7) -----------------------------------------------------------------------------


def _top_page(context: click.Context, nouns: Mapping[str, click.Command | None]) -> Iterator[str]:
    yield _title("kvmsec", kvmsec)
    yield from _synopsis(context)
    yield _section("DESCRIPTION")
    yield "kvmsec starts KVM guests that do not trust each other on nodes that must not trust\n"
    yield "them: every instance runs under a uid of its own that can reach nothing.\n"
    yield from _options(context)
    yield _section("COMMANDS")
    for name, noun in nouns.items():
        yield _entry(f"{_bold(f'kvmsec-{name}')}(1)", noun.get_short_help_str(200) if noun else "")
    yield _section("EXIT STATUS")
    for status, meaning in _EXIT_STATUS:
        yield _entry(status, meaning)
    yield _section("ENVIRONMENT")
    yield _entry("KVMSEC_ROOT", "As --root, which wins.")
    yield _section("FILES")
    for path, meaning in _FILES:
        yield _entry(path, meaning)
    yield _section("SEE ALSO")
    yield ",\n".join(f"{_bold(f'kvmsec-{name}')}(1)" for name in nouns) + "\n"


def _noun_page(parent: click.Context, name: str, noun: click.Command) -> Iterator[str]:
    context = click.Context(noun, info_name=name, parent=parent)
    yield _title(f"kvmsec-{name}", noun)
    verbs = _verbs_of(context)
    yield from _synopsis(context, *verbs)
    yield _section("DESCRIPTION")
    yield _text(noun.help)
    yield from _options(context)
    if verbs:
        yield _section("COMMANDS")
    for verb in verbs:
        yield f".SS {_plain(verb.command_path)}\n"
        yield _text(verb.command.help)
        yield from _entries(verb)
    yield _section("SEE ALSO")
    yield f"{_bold('kvmsec')}(1)\n"


def _verbs_of(context: click.Context) -> tuple[click.Context, ...]:
    """All that can be called below a noun, whatever groups are in between."""
    return tuple(leaf for below in _below(context) for leaf in _verbs_of(below) or (below,))


def _below(context: click.Context) -> Iterator[click.Context]:
    group = context.command
    if isinstance(group, click.Group):
        for name in group.list_commands(context):
            if command := group.get_command(context, name):
                yield click.Context(command, info_name=name, parent=context)


def _synopsis(*contexts: click.Context) -> Iterator[str]:
    yield _section("SYNOPSIS")
    leaves = [one for one in contexts if not isinstance(one.command, click.Group)]
    for context in leaves or contexts:
        pieces = " ".join(context.command.collect_usage_pieces(context))
        yield f".PP\n{_bold(context.command_path)} {_plain(pieces)}\n"


def _options(context: click.Context) -> Iterator[str]:
    if entries := list(_entries(context)):
        yield _section("OPTIONS")
        yield from entries


def _entries(context: click.Context) -> Iterator[str]:
    for parameter in context.command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None and record[1]:  # An argument says what it is by its name.
            yield _entry(_bold(record[0]), record[1])


def _title(name: str, command: click.Command) -> str:
    title = f'.TH {_plain(name).upper()} 1 "" "kvmsec {version("kvmsec")}" "kvmsec"\n'
    return f"{title}.SH NAME\n{_plain(name)} \\- {_plain(command.get_short_help_str(200))}\n"


def _section(name: str) -> str:
    return f".SH {name}\n"


def _entry(term: str, meaning: str) -> str:
    return f".TP\n{term if term.startswith(chr(92)) else _bold(term)}\n{_plain(meaning)}\n"


def _text(words: str | None) -> str:
    """Help as click has it: a blank line begins a paragraph."""
    return "\n.PP\n".join(_plain(part) for part in (words or "").strip().split("\n\n")) + "\n"


def _bold(text: str) -> str:
    return rf"\fB{_plain(text)}\fR"


def _plain(text: str) -> str:
    """Text in which roff sees no command: lines are joined, a hyphen stays one when copied."""
    joined = " ".join(text.split()).replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{joined}" if joined.startswith((".", "'")) else joined


if __name__ == "__main__":
    write_documents(Path(sys.argv[1]))
