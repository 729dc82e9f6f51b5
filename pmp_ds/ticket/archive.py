"""A plain tar in memory: what sealed files contain, and what `tar` opens too.

archive = pack({"ticket/ticket.json": b"{}"})
files = unpack(archive, lambda name: name if name in known else None, where, "contains no ticket")
"""

import io
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Literal

from pmp_ds.errors import UserError

_LARGE = 1 << 33
"""Bytes of a file that the size in a ustar header cannot tell."""


def pack(files: Mapping[str, bytes]) -> bytes:
    """Return a tar of ``files`` by name, with their folders, and without times and owners: equal
    files give equal bytes."""
    buffer, folders = io.BytesIO(), set()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in files.items():
            for parent in [*PurePosixPath(name).parents][-2::-1]:
                if parent not in folders:
                    folders.add(parent)
                    folder = tarfile.TarInfo(str(parent))
                    folder.type, folder.mode = tarfile.DIRTYPE, 0o700
                    tar.addfile(folder)
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(content), 0o600
            tar.format = _format(info.size)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def _format(size: int) -> Literal[0, 1, 2]:
    """Return the format of a file's header: GNU's, which every tar reads, only where ustar, as
    older archives have it throughout, is too narrow."""
    return tarfile.GNU_FORMAT if size >= _LARGE else tarfile.USTAR_FORMAT


def unpack(
    archive: bytes, name_of: Callable[[str], str | None], where: Path, nothing: str
) -> dict[str, bytes]:
    """Return the regular files in a tar under the names that ``name_of`` gives them, without those
    that get none; nothing is written to disk.

    Raises UserError when it is damaged: ``where`` ``nothing`` if it is not a tar.
    """
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:") as tar:
            for member in tar:
                name = name_of(member.name)
                if name is None or member.type != tarfile.REGTYPE:
                    continue
                if name in found:
                    raise UserError(f"{where} is damaged: it contains two files named {name!r}")
                # Holes and sizes in a header cost nothing to write, but memory to believe.
                if member.issparse() or member.offset_data + member.size > len(archive):
                    raise UserError(f"{where} is damaged: {name} is not in it as it stands")
                found[name] = archive[member.offset_data : member.offset_data + member.size]
    except UserError:
        raise
    except Exception:  # noqa: BLE001 - a stranger's archive, and whatever tarfile raises for it
        raise UserError(f"{where} {nothing}") from None
    return found
