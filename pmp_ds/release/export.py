"""Plain private weights in, a mask-free Hugging Face folder out.

    release/  model.safetensors (or shards and an index)  config.json  generation_config.json
              tokenizer files  README.md  SHA256SUMS

Nothing else is ever written there. The folder is built as ``release.incomplete``, read back,
loaded in a fresh process that has no pmp_ds, and only then gets its name.
"""

import hashlib
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file

from pmp_ds.errors import UserError
from pmp_ds.progress import Progress
from pmp_ds.release.metadata import as_json, copy_tokenizer, generation_config, release_config
from pmp_ds.release.model_card import CardFacts, render
from pmp_ds.release.source import INDEX_FILE, SINGLE_FILE, Source, open_source
from pmp_ds.release.verify import run_alone, verify_bytes, verify_reload
from pmp_ds.run_dir import fsync_dir

ReleaseDtype = Literal["bf16", "fp32"]
_TORCH = {"bf16": torch.bfloat16, "fp32": torch.float32}
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
_ROUNDED_SHARE = 0.01  # of a matrix; by chance 2^-16 of fp32 numbers have 16 low bits of zero


@dataclass(frozen=True, kw_only=True)
class ExportSummary:
    """What was released."""

    out: Path
    files: tuple[str, ...]
    """Names in ``out``, sorted."""

    num_params: int
    total_bytes: int
    """Bytes of all tensors."""

    dtype: ReleaseDtype
    logits_difference: float
    """Largest absolute difference between the release's logits and the run's; usually 0."""


def export(
    weights: Path,
    out: Path,
    *,
    tokenizer_dir: Path,
    card: CardFacts,
    dtype: ReleaseDtype = "bf16",
    max_shard_size: str | int = "5GB",
    private: bool = False,
) -> ExportSummary:
    """Release ``weights`` (a folder as in source.py) as the new folder ``out``.

    The default dtype is bf16 whatever the run's. fp32 is refused for bf16 weights: their low 16
    bits would be zero exactly where training changed nothing. At most one shard of
    ``max_shard_size`` (bytes, or as `500MB`, `5GB`) is in memory while writing, and one copy of
    the model in ``dtype`` while checking. With ``private`` the folder is 0700.

    Raises UserError for an existing ``out``, unusable weights or tokenizer, or a refused dtype;
    RuntimeError when the check fails. On any error nothing is left.
    """
    require_absent(out)
    limit = shard_bytes(max_shard_size)
    source = open_source(weights)
    if dtype == "fp32":
        _refuse_rounded(source)
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = out.with_name(out.name + ".incomplete")
    shutil.rmtree(staging, ignore_errors=True)  # of an export that was killed
    staging.mkdir(mode=0o700 if private else 0o755)
    try:
        files = _write_weights(source, staging, dtype, limit)
        config = release_config(source.config, str(_TORCH[dtype]).removeprefix("torch."))
        readme = render(card, config, source.num_params, dtype)
        (staging / "config.json").write_text(as_json(config), encoding="utf-8")
        generation = as_json(generation_config(source.config))
        (staging / "generation_config.json").write_text(generation, encoding="utf-8")
        copy_tokenizer(tokenizer_dir, staging)
        (staging / "README.md").write_text(readme, encoding="utf-8")
        verify_bytes(source, staging, files, _TORCH[dtype])
        difference = verify_reload(source, staging, _TORCH[dtype])
        names = _seal(staging, private)
        os.replace(staging, out)
        fsync_dir(out.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return ExportSummary(
        out=out,
        files=names,
        num_params=source.num_params,
        total_bytes=source.num_params * _TORCH[dtype].itemsize,
        dtype=dtype,
        logits_difference=difference,
    )


def require_absent(out: Path) -> None:
    """Raises UserError when ``out`` exists: a release is never overwritten."""
    if out.exists():
        raise UserError(f"{out} exists already: move it away, or name another folder with --out")


def generate_sample(
    release: Path, prompt: str, max_new_tokens: int = 40, *, seed: int | None = None
) -> str:
    """``prompt`` and its continuation by the release, loaded in a fresh process without pmp_ds.

    Greedy, or sampled from ``seed``. Raises RuntimeError when the release does not load.
    """
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch) / "answer.txt"
        run_alone(
            action="generate",
            folder=str(release.resolve()),
            result=str(result),
            prompt=prompt,
            max_new_tokens=max_new_tokens,
            seed=seed,
        )
        return result.read_text(encoding="utf-8")


def shard_bytes(size: str | int) -> int:
    """`5GB` -> 5000000000; raises UserError for anything but a whole number of KB, MB or GB."""
    if isinstance(size, int):
        return size
    number, unit = size[:-2].strip(), size[-2:].upper()
    if not number.isdecimal() or int(number) < 1 or unit not in _UNITS:
        raise UserError(f"max-shard-size={size!r} is not a size such as 500MB or 5GB")
    return int(number) * _UNITS[unit]


def _refuse_rounded(source: Source) -> None:
    """fp32 may leave only when no part of it was ever rounded to bf16."""
    if source.dtype != torch.float32:
        raise UserError(
            f"dtype=fp32 is refused: {source.folder} holds bf16 weights. In fp32 their low bits "
            "would show which parameters were trained: export bf16"
        )
    for name in source.names:
        bits = source.tensor(name, torch.float32).view(torch.int32)
        rounded = ((bits & 0xFFFF) == 0) & (bits != 0)
        if bits.ndim > 1 and int(rounded.sum()) > 1 + _ROUNDED_SHARE * bits.numel():
            raise UserError(
                f"dtype=fp32 is refused: a part of {source.folder} was rounded to bf16 once, and "
                "fp32 would show which: export bf16"
            )


def _write_weights(
    source: Source, folder: Path, dtype: ReleaseDtype, limit: int
) -> dict[str, str]:  # tensor -> file
    """Greedy shards in the model's order, with at most one in memory."""
    itemsize = _TORCH[dtype].itemsize
    shards: list[list[str]] = [[]]
    size = 0
    for name in source.names:
        nbytes = source.sizes[name] * itemsize
        if shards[-1] and size + nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    files: dict[str, str] = {}
    with Progress("export", "tensor", len(source.names)) as bar:
        for number, names in enumerate(shards, start=1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            if len(shards) == 1:
                file = SINGLE_FILE
            tensors: dict[str, torch.Tensor] = {}
            for name in names:
                tensors[name] = source.tensor(name, _TORCH[dtype])
                bar.update()
            save_file(tensors, folder / file, metadata={"format": "pt"})
            files |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": source.num_params * itemsize},
            "weight_map": files,
        }
        (folder / INDEX_FILE).write_text(as_json(index), encoding="utf-8")
    return files


def _seal(folder: Path, private: bool) -> tuple[str, ...]:
    """Write SHA256SUMS, set file modes and flush everything; the sorted names in ``folder``."""
    names = sorted(path.name for path in folder.iterdir())
    sums = []
    for name in names:
        with open(folder / name, "rb") as file:
            sums.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {name}\n")
    (folder / "SHA256SUMS").write_text("".join(sums), encoding="utf-8")
    names = sorted([*names, "SHA256SUMS"])
    for name in names:
        path = folder / name
        path.chmod(0o600 if private else 0o644)
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    fsync_dir(folder)
    return tuple(names)
