"""Private keys: which kinds there are, made, read and written as PKCS #8."""

from enum import StrEnum
from typing import Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from kvmsec.pki.errors import BadPem
from kvmsec.pki.pems import is_key, split_pems

PrivateKey = ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
PublicKey = ed25519.Ed25519PublicKey | ec.EllipticCurvePublicKey | rsa.RSAPublicKey

_RSA_BITS: Final = 3072
_RSA_MOST_BITS: Final = 8192  # A check of a signature by a larger one costs a peer's victim time.
_RSA_EXPONENT: Final = 65537


class KeyKind(StrEnum):
    """The kinds of key that a node or a cluster may have: about 128 bits of strength each."""

    ED25519 = "ed25519"
    P256 = "p256"
    RSA3072 = "rsa3072"


def make_key(kind: KeyKind = KeyKind.ED25519) -> PrivateKey:
    """A new key, from the system's random numbers."""
    match kind:
        case KeyKind.ED25519:
            return ed25519.Ed25519PrivateKey.generate()
        case KeyKind.P256:
            return ec.generate_private_key(ec.SECP256R1())
        case KeyKind.RSA3072:
            return rsa.generate_private_key(_RSA_EXPONENT, _RSA_BITS)


def kind_of(key: object) -> KeyKind:
    """The kind of a public key. Raises ValueError for one that no node may have.

    RSA keys count as `RSA3072` from 3072 bits on.
    """
    match key:
        case ed25519.Ed25519PublicKey():
            return KeyKind.ED25519
        case ec.EllipticCurvePublicKey(curve=ec.SECP256R1()):
            return KeyKind.P256
        case ec.EllipticCurvePublicKey(curve=curve):
            raise ValueError(f"its key is on the curve {curve.name}, not on P-256")
        case rsa.RSAPublicKey(key_size=bits):
            if not _RSA_BITS <= bits <= _RSA_MOST_BITS:
                raise ValueError(f"its RSA key has {bits} bits, not {_RSA_BITS}")
            if key.public_numbers().e != _RSA_EXPONENT:
                raise ValueError(f"its RSA key's exponent is not {_RSA_EXPONENT}")
            return KeyKind.RSA3072
        case _:
            raise ValueError("its key is neither Ed25519, P-256 nor RSA")


def load_key(pem: str, what: str = "the key") -> PrivateKey:
    """The key in a PEM text, PKCS #8 or the traditional formats of OpenSSL.

    Raises BadPem, which never shows the text; `what` says in it which key that was.
    """
    # OpenSSL puts a block with the parameters of a curve before a traditional key on it.
    blocks = [block for block in split_pems(pem, what) if is_key(block)]
    if len(blocks) != 1:
        raise BadPem(what, f"it has {len(blocks)} keys, not one")
    try:
        # To prove an RSA key's primes takes half a second, each time that a node reads its own.
        # Who could have put a bad one there could have kept a copy of a good one.
        key = serialization.load_pem_private_key(
            blocks[0].encode(), password=None, unsafe_skip_rsa_key_validation=True
        )
        kind_of(key.public_key())
    except TypeError as error:  # it is encrypted
        hint = "store the key without a passphrase; its file is 0600 and root's"
        raise BadPem(what, "it is sealed with a passphrase", hint=hint) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        words = str(error) if str(error).startswith("its ") else "it is no whole key in PEM"
        raise BadPem(what, words) from None
    assert isinstance(key, PrivateKey)
    return key


def dump_key(key: PrivateKey) -> str:
    """The key as unencrypted PKCS #8 in PEM."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    ).decode("ascii")


def public_bytes(key: PublicKey) -> bytes:
    """The key's SubjectPublicKeyInfo in DER: equal for equal keys."""
    return key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
