"""PEM texts: blocks told apart, and the key and certificate that belong together."""

import re
from typing import Final, Self

from attrs import field, frozen

from kvmsec.pki.errors import BadPem

LIMIT_CHARS: Final = 1 << 16
_MOST_BLOCKS: Final = 16
# RFC 7468. No block has five hyphens inside, so that the search takes time linear in the text.
_BLOCK: Final = re.compile(
    r"-----BEGIN ([A-Z0-9 ]{1,40})-----(?:[^-]|-(?!----))*-----END \1-----", re.ASCII
)
CERTIFICATE_LABEL: Final = "CERTIFICATE"


@frozen
class Pair:
    """A certificate and the key that belongs to it, both PEM. The key is never shown."""

    certificate_pem: str
    key_pem: str = field(repr=False)

    @property
    def pem(self) -> str:
        """Both in one text: the key first, as `client.pem` has it."""
        return self.key_pem + self.certificate_pem

    @classmethod
    def parse(cls, text: str, what: str = "the pair") -> Self:
        """The pair in a text with one key and one certificate, in any order. Raises BadPem.

        Whether the two belong together is for `certificates.require_whole` to say.
        """
        blocks = split_pems(text, what)
        certificates = [block for block in blocks if label_of(block) == CERTIFICATE_LABEL]
        keys = [block for block in blocks if is_key(block)]
        if len(certificates) != 1 or len(keys) != 1:
            raise BadPem(
                what, f"it has {len(certificates)} certificates and {len(keys)} keys, not one each"
            )
        return cls(certificates[0], keys[0])


def split_pems(text: str, what: str = "the text") -> tuple[str, ...]:
    """The PEM blocks of a text, in order; what stands between them is left out.

    At most 64 KiB and 16 blocks. Raises BadPem for more, for none, and for a block that is cut off.
    """
    if len(text) > LIMIT_CHARS:
        raise BadPem(what, f"it is longer than {LIMIT_CHARS} characters")
    blocks = tuple(match[0] + "\n" for match in _BLOCK.finditer(text))
    begun = text.count("-----BEGIN ")
    if not blocks:
        raise BadPem(what, "there is no PEM block in it")
    if begun != len(blocks):
        raise BadPem(what, "one of its PEM blocks is cut off")
    if begun > _MOST_BLOCKS:
        raise BadPem(what, f"it has {begun} PEM blocks, more than {_MOST_BLOCKS}")
    return blocks


def label_of(block: str) -> str:
    """What stands behind BEGIN in a block that `split_pems` returned."""
    return block.partition("-----BEGIN ")[2].partition("-----")[0]


def is_key(block: str) -> bool:
    """Whether a block holds a private key, PKCS #8 or traditional, encrypted or not."""
    return label_of(block).endswith("PRIVATE KEY")
