"""The age file format with X25519 keys, from its specification (https://age-encryption.org/v1) and
without pyrage: stands for another implementation that reads and writes sealed files."""

import base64
import hmac
import os
import re

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

_VERSION, _CHUNK = b"age-encryption.org/v1", 1 << 16
_STANZA = re.compile(rb"^-> X25519 (\S+)\n(\S+)\n", re.MULTILINE)


def decrypt(sealed: bytes, secret_key: str) -> bytes:
    """Decrypt with ``secret_key`` (AGE-SECRET-KEY-1...); a wrong key or a changed byte raises."""
    private = X25519PrivateKey.from_private_bytes(_bech32(secret_key))
    header, mac, body = _split(sealed)
    share, wrapped = (_unbase64(part) for part in _STANZA.findall(header)[0])
    shared = private.exchange(X25519PublicKey.from_public_bytes(share))
    wrap_key = _hkdf(shared, share + private.public_key().public_bytes_raw(), _VERSION + b"/X25519")
    file_key = ChaCha20Poly1305(wrap_key).decrypt(bytes(12), wrapped, None)
    assert hmac.digest(_hkdf(file_key, b"", b"header"), header, "sha256") == mac
    return b"".join(_chunks(body[16:], _hkdf(file_key, body[:16], b"payload"), _CHUNK + 16, False))


def encrypt(data: bytes, public_key: str) -> bytes:
    recipient, ephemeral = _bech32(public_key), X25519PrivateKey.generate()
    file_key, nonce = os.urandom(16), os.urandom(16)
    share = ephemeral.public_key().public_bytes_raw()
    shared = ephemeral.exchange(X25519PublicKey.from_public_bytes(recipient))
    wrap_key = _hkdf(shared, share + recipient, _VERSION + b"/X25519")
    wrapped = ChaCha20Poly1305(wrap_key).encrypt(bytes(12), file_key, None)
    header = b"%b\n-> X25519 %b\n%b\n---" % (_VERSION, _base64(share), _base64(wrapped))
    mac = _base64(hmac.digest(_hkdf(file_key, b"", b"header"), header, "sha256"))
    body = b"".join(_chunks(data, _hkdf(file_key, nonce, b"payload"), _CHUNK, True))
    return header + b" " + mac + b"\n" + nonce + body


def _split(sealed: bytes) -> tuple[bytes, bytes, bytes]:
    """Split into the header up to its ---, its authentication code, and the rest."""
    end = sealed.index(b"\n---") + 4
    newline = sealed.index(b"\n", end)
    return sealed[:end], _unbase64(sealed[end + 1 : newline]), sealed[newline + 1 :]


def _chunks(data: bytes, key: bytes, size: int, seal: bool) -> list[bytes]:
    """Decrypt pieces of ``size`` bytes, each under its own nonce, which marks the last one."""
    cipher = ChaCha20Poly1305(key)
    work = cipher.encrypt if seal else cipher.decrypt
    starts = range(0, max(1, len(data)), size)
    return [
        work(i.to_bytes(11, "big") + bytes([start == starts[-1]]), data[start : start + size], None)
        for i, start in enumerate(starts)
    ]


def _hkdf(secret: bytes, salt: bytes, info: bytes) -> bytes:
    return HKDF(algorithm=hashes.SHA256(), length=32, salt=salt, info=info).derive(secret)


def _bech32(text: str) -> bytes:
    """Decode the 32 bytes of a key; its checksum is not checked."""
    digits = text.lower().rpartition("1")[2][:-6]
    number = 0
    for digit in digits:
        number = number << 5 | "qpzry9x8gf2tvdw0s3jn54khce6mua7l".index(digit)
    return (number >> (5 * len(digits) - 256)).to_bytes(32, "big")


def _base64(data: bytes) -> bytes:
    return base64.b64encode(data).rstrip(b"=")


def _unbase64(data: bytes) -> bytes:
    return base64.b64decode(data + b"=" * (-len(data) % 4))
