"""A small document sealed with a passphrase, to be carried by hand.

Version 1: scrypt (RFC 7914) with N = 2^17, r = 8, p = 1, which takes 128 MiB and some tenths of a
second, then ChaCha20-Poly1305 (RFC 8439). The numbers belong to the version and are not read from
the file: a file can't make its reader work more. A check value tells a wrong passphrase from a
damaged file; it helps a guesser no more than the cipher's own tag.
"""

import hashlib
import hmac
import secrets
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from kvmsec.pki.errors import PassphraseTooShort, SealBroken, WrongPassphrase

LIMIT_BYTES: Final = 1 << 18
SHORTEST_PASSPHRASE: Final = 12

_HEADER: Final = b"kvmsec sealed 1\n"
_SALT_BYTES: Final = 16
_CHECK_BYTES: Final = 16
_NONCE_BYTES: Final = 12
_TAG_BYTES: Final = 16
_COST: Final = 1 << 17
_OVERHEAD: Final = len(_HEADER) + _SALT_BYTES + _CHECK_BYTES + _NONCE_BYTES + _TAG_BYTES
# Easy to tell apart when read aloud or typed.
_LETTERS: Final = "abcdefghjkmnpqrstuvwxyz23456789"
_GROUPS: Final = 6
_GROUP_CHARS: Final = 5


def make_passphrase() -> str:
    """A new passphrase of 148 bits, in groups that can be typed."""
    groups = (
        "".join(secrets.choice(_LETTERS) for _ in range(_GROUP_CHARS)) for _ in range(_GROUPS)
    )
    return "-".join(groups)


def seal(document: bytes, passphrase: str) -> bytes:
    """Seal at most 256 KiB. Raises ValueError for more, and PassphraseTooShort."""
    if len(document) > LIMIT_BYTES:
        raise ValueError(f"a sealed document has at most {LIMIT_BYTES} bytes")
    if len(passphrase.strip()) < SHORTEST_PASSPHRASE:
        raise PassphraseTooShort(SHORTEST_PASSPHRASE)
    salt, nonce = secrets.token_bytes(_SALT_BYTES), secrets.token_bytes(_NONCE_BYTES)
    key, check = _stretched(passphrase, salt)
    head = _HEADER + salt + check + nonce
    return head + ChaCha20Poly1305(key).encrypt(nonce, document, head)


def open_sealed(sealed: bytes, passphrase: str) -> bytes:
    """The document. Raises SealBroken and WrongPassphrase."""
    if not sealed.startswith(_HEADER):
        raise SealBroken("no kvmsec, or a later one, has sealed it")
    if not _OVERHEAD <= len(sealed) <= _OVERHEAD + LIMIT_BYTES:
        raise SealBroken("it is cut off, or longer than one can be")
    salt, rest = _split(sealed[len(_HEADER) :], _SALT_BYTES)
    check, rest = _split(rest, _CHECK_BYTES)
    nonce, ciphertext = _split(rest, _NONCE_BYTES)
    key, wanted = _stretched(passphrase, salt)
    if not hmac.compare_digest(check, wanted):
        raise WrongPassphrase
    try:
        return ChaCha20Poly1305(key).decrypt(nonce, ciphertext, sealed[: -len(ciphertext)])
    except InvalidTag:
        raise SealBroken("it was changed after it was sealed") from None


def _stretched(passphrase: str, salt: bytes) -> tuple[bytes, bytes]:
    """The key, and the check value that stands in the file."""
    stretched = hashlib.scrypt(
        passphrase.strip().encode(), salt=salt, n=_COST, r=8, p=1, maxmem=1 << 28, dklen=48
    )
    return stretched[:32], stretched[32:]


def _split(data: bytes, length: int) -> tuple[bytes, bytes]:
    return data[:length], data[length:]
