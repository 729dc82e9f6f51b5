"""Crafted sealed tickets: content inside the age file, and around it."""

import gzip
import io
import tarfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Literal

from pmp_ds.ticket.ticket import MANIFEST_FILE, MASK_FILE
from tests.helpers.crafted.variants import DEEP, DOCUMENTS, NASTY, Change, bytes_
from tests.helpers.strangers import packed, ticket_files

_SHAPES = {"w": (3, 5), "b": (8,)}
_GIANT = 4 << 30


def named() -> Iterator[tuple[str, Change]]:
    """Yield (name, change of the folder of a sealed ticket)."""
    for name, archive in _archives():
        yield name, _sealed(archive)
    for start in range(0, 240, 4):
        yield f"age: bytes {start} to {start + 3} zero", _zero(start)
    for name, text in {
        "only a header": b"age-encryption.org/v1\n",
        "no recipients": b"age-encryption.org/v1\n--- AAAA\n",
        "many recipients": b"age-encryption.org/v1\n" + b"-> X25519 AAAA\nAAAA\n" * DEEP,
        "long line": b"age-encryption.org/v1\n-> X25519 " + b"A" * 10**7,
        "armor": b"-----BEGIN AGE ENCRYPTED FILE-----\n" + b"A" * 10**6,
        "other version": b"age-encryption.org/v9\n-> X25519 AAAA\nAAAA\n--- AAAA\n",
        "scrypt": b"age-encryption.org/v1\n-> scrypt AAAAAAAAAAAAAAAAAAAAAA 63\nAAAA\n--- AAAA\n",
    }.items():
        yield f"age: {name}", partial(_written, text)


def _written(text: bytes, folder: Path) -> None:
    bytes_(text)(folder / "copy.age")


def _sealed(archive: bytes) -> Change:
    from tests.helpers.crafted import kinds

    return lambda folder: bytes_(kinds.sealed(archive))(folder / kinds.SEALED)


def _zero(start: int) -> Change:
    def change(folder: Path) -> None:
        path = folder / "copy.age"
        whole = bytearray(path.read_bytes())
        whole[start : start + 4] = bytes(4)
        path.write_bytes(bytes(whole))

    return change


def _tar(*members: tuple[tarfile.TarInfo, bytes], form: Literal[0, 1, 2] = 2) -> bytes:
    """Return a tar of these members, whose sizes may be false."""
    sink = io.BytesIO()
    for info, content in members:
        sink.write(info.tobuf(form, errors="surrogateescape"))
        sink.write(content + bytes(-len(content) % 512))
    return sink.getvalue() + bytes(1024)


def _info(
    name: str, length: int, kind: bytes = tarfile.REGTYPE, pax: Mapping[str, str] | None = None
) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.type = length, kind
    info.pax_headers = {key.replace("_", "."): value for key, value in (pax or {}).items()}
    return info


def _archives() -> Iterator[tuple[str, bytes]]:
    files = ticket_files(packed(_SHAPES), _SHAPES)
    mask, manifest = files[MASK_FILE], files[MANIFEST_FILE]
    good = _info(f"ticket/{MANIFEST_FILE}", len(manifest)), manifest
    other = _info(f"ticket/{MASK_FILE}", len(mask)), mask
    yield "good", _tar(good, other)
    map_ = b"1\n0\n1\n"
    for version, pax in {
        "1.0": {
            "GNU_sparse_major": "1",
            "GNU_sparse_minor": "0",
            "GNU_sparse_name": f"ticket/{MASK_FILE}",
            "GNU_sparse_realsize": str(_GIANT),
        },
        "0.1": {"GNU_sparse_map": f"0,1,{_GIANT},0", "GNU_sparse_size": str(_GIANT)},
        "0.0": {
            "GNU_sparse_size": str(_GIANT),
            "GNU_sparse_numblocks": "1",
            "GNU_sparse_offset": "0",
            "GNU_sparse_numbytes": "1",
        },
        "wrong": {"GNU_sparse_major": "x", "GNU_sparse_minor": "y"},
        "no map": {"GNU_sparse_map": "", "GNU_sparse_size": "-1"},
    }.items():
        yield f"sparse {version}", _tar((_info(f"ticket/{MASK_FILE}", 512, pax=pax), map_), good)
    for size in (_GIANT, 1 << 60, len(manifest) + 10**4):
        yield f"size {size}", _tar((_info(f"ticket/{MANIFEST_FILE}", size), manifest), other)
    for text in ("-1", "x", str(1 << 62), "9" * 30):
        yield (
            f"pax size {text[:12]}",
            _tar(
                (_info(f"ticket/{MANIFEST_FILE}", len(manifest), pax={"size": text}), manifest),
                other,
            ),
        )
    for name, kind in {
        "link": tarfile.SYMTYPE,
        "hard link": tarfile.LNKTYPE,
        "device": tarfile.CHRTYPE,
        "fifo": tarfile.FIFOTYPE,
        "folder": tarfile.DIRTYPE,
        "GNU sparse": tarfile.GNUTYPE_SPARSE,
        "contiguous": tarfile.CONTTYPE,
        "unknown": b"Z",
    }.items():
        yield f"mask is a {name}", _tar((_info(f"ticket/{MASK_FILE}", 0, kind), b""), good)
    for name in ("../../ticket.json", "/ticket.json", "a/b/c/ticket.json", "ticket.json/", NASTY):
        yield f"name {name[:20]!r}", _tar((_info(name, len(manifest)), manifest), other)
    yield "one missing", _tar(good)
    yield "twice", _tar(good, other, good)
    yield "many members", _tar(*[(_info(f"x{i}", 0), b"") for i in range(20_000)], good, other)
    yield "long name", _tar((_info("x" * 10**6, 0), b""), good, other, form=1)
    for kind in (b"L", b"K", b"x", b"g", b"X"):
        huge = _info("x", _GIANT, kind).tobuf(tarfile.GNU_FORMAT)
        yield f"header {kind!r} of 4 GiB", huge + bytes(1024)
        wrong = _info("x", 20, kind).tobuf(tarfile.GNU_FORMAT) + b"99999999999 path=x\n".ljust(512)
        yield f"header {kind!r} that lies", wrong + _tar(good, other)
        chain = _info("x", 0, kind).tobuf(tarfile.GNU_FORMAT) * 5000
        yield f"header {kind!r} 5000 times", chain + _tar(good, other)
    yield "gzip", gzip.compress(_tar(good, other))
    yield "nothing", b""
    yield "zeros", bytes(1 << 20)
    yield "text", NASTY.encode() * 100
    yield "check sum", b"x" * 512 + _tar(good, other)
    for name in DOCUMENTS:
        content = _document(name)
        info = _info(f"ticket/{MANIFEST_FILE}", len(content))
        yield f"{MANIFEST_FILE}: {name}", _tar((info, content), other)


def _document(name: str) -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        DOCUMENTS[name](Path(place, "x"))
        return Path(place, "x").read_bytes()
