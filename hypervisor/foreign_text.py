"""Text that a guest, an image or QEMU chose, made fit to be shown to a person."""


def escaped(text: str | bytes, *, limit_chars: int = 200) -> str:
    """Return `text` on one line: what doesn't print is escaped, what is too long is cut.

    Escape sequences, line feeds, bidirectional overrides and undecodable bytes come out as `\\x1b`
    and the like, so that foreign words can neither steer a terminal nor forge a line of a log.
    """
    cut = text[:limit_chars]
    rest = len(text) - len(cut)
    words = cut.decode(errors="backslashreplace") if isinstance(cut, bytes) else cut
    if words.isprintable():
        shown = words
    else:
        shown = "".join(
            character if character.isprintable() else character.encode("unicode_escape").decode()
            for character in words
        )
    return f"{shown}… (and {rest} more)" if rest else shown
