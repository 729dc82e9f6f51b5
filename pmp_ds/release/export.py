"""Export plain private weights as a mask-free Hugging Face folder.

    release/  model.safetensors (or shards and an index)  config.json  generation_config.json
              tokenizer files  README.md  SHA256SUMS  (model.sig)

Nothing else is written there. The folder is built as ``release.incomplete``, read back, checked
against the allow-list, loaded in a fresh process without pmp_ds, and only then renamed.
"""

import contextlib
import datetime
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from pmp_ds.config.precision import PRECISIONS
from pmp_ds.errors import UserError
from pmp_ds.lease import hold
from pmp_ds.model.folder_rules import INDEX_FILE, SINGLE_FILE
from pmp_ds.progress import Progress
from pmp_ds.release.allow_list import SUMS_FILE, require_clean
from pmp_ds.release.ledger import Claim
from pmp_ds.release.metadata import (
    begin_of_text,
    end_of_text,
    generation_config,
    longest_context,
    release_config,
)
from pmp_ds.release.model_card import CardFacts, DerivativeFacts, render
from pmp_ds.release.rounding import BF16_BITS, FP16_BITS, Rounded
from pmp_ds.release.signing import sign
from pmp_ds.release.source import Source, open_source
from pmp_ds.release.tokenizer_files import as_json, copy_tokenizer, settle_tokenizer
from pmp_ds.release.verify import run_alone, verify_reload
from pmp_ds.run_dir import fsync_dir, sha256
from pmp_ds.tensor_file import write_tensors

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class ExportSummary:
    """The result of an export."""

    out: Path
    files: tuple[str, ...]
    """Names in ``out``, sorted."""

    num_params: int
    total_bytes: int
    """Bytes of all tensors."""

    dtype: str
    logits_difference: float
    """Largest absolute difference between the logits of release and run; usually 0."""


def export(
    weights: Path,
    out: Path,
    *,
    tokenizer_dir: Path,
    card: CardFacts | DerivativeFacts,
    dtype: str = "bf16",
    max_shard_size: str | int = "5GB",
    private: bool = False,
    vocab_size: int | None = None,
    leading_bos: bool | None = None,
    claim: Claim | None = None,
    signing_key: Path | None = None,
) -> ExportSummary:
    """Release ``weights`` (a folder as in source.py) as the new folder ``out``.

    The default dtype is bf16 whatever the run's. Another dtype is refused if a part of the weights
    was ever rounded differently, because its low bits would show which part. Embeddings are cut to
    ``vocab_size`` tokens. ``leading_bos``: whether begin of text starts every document of the data;
    None: as the tokenizer has it. Writing needs one parameter in memory, before and after its
    conversion; checking needs one copy of the model in ``dtype``. With ``private`` the folder is
    0700. A ``claim`` is checked against its ledger first, and recorded there before ``out``
    appears. ``signing_key`` is a PEM file.

    Raises UserError for an existing ``out``, unusable weights or tokenizer, a refused dtype or
    claim, and a breach of the allow-list; RuntimeError when a check fails. After an error nothing
    is left.
    """
    require_absent(out)
    limit = shard_bytes(max_shard_size)
    staging = out.with_name(out.name + ".incomplete")
    with (
        hold(out.parent, f"the release {out}", prefix=f"{out.name}."),
        contextlib.closing(open_source(weights, vocab_size)) as source,
    ):
        require_absent(out)  # another export may have finished just now
        digest = _digest(source)
        if claim is not None:
            claim.check(digest)
        if dtype != "bf16":
            _refuse_rounded(source, dtype)
        shutil.rmtree(staging, ignore_errors=True)  # left by an export that was killed
        staging.mkdir(mode=0o700 if private else 0o755)
        try:
            sums = write_model(source, staging, dtype, limit)
            config = release_config(
                source.config, str(PRECISIONS[dtype].dtype).removeprefix("torch.")
            )
            readme = render(card, config, source.num_params, dtype)
            copy_tokenizer(tokenizer_dir, staging)
            pad_id = settle_tokenizer(
                staging,
                {"bos": begin_of_text(source.config), "eos": end_of_text(source.config)},
                leading_bos=leading_bos,
                context=longest_context(source.config),
            )
            generation = as_json(generation_config(source.config, pad_id))
            (staging / "generation_config.json").write_text(generation, encoding="utf-8")
            (staging / "README.md").write_text(readme, encoding="utf-8")
            difference = verify_reload(source, staging, PRECISIONS[dtype].dtype)
            _write_sums(staging, sums)
            if signing_key is not None:
                sign(staging, signing_key)
            names = _seal(staging, private, card.date)
            require_clean(staging)
            if claim is not None:
                claim.record(digest, _released_digest(staging, source, digest, dtype), dtype)
            os.replace(staging, out)
            fsync_dir(out.parent)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return ExportSummary(
        out=out,
        files=names,
        num_params=source.num_params,
        total_bytes=_total_bytes(source, dtype),
        dtype=dtype,
        logits_difference=difference,
    )


def require_absent(out: Path) -> None:
    """Raise UserError when ``out`` exists: a release is never overwritten."""
    if out.exists():
        raise UserError(f"{out} already exists: move it away, or name another folder with --out")


def generate_sample(
    release: Path, prompt: str, max_new_tokens: int = 40, *, seed: int | None = None
) -> str:
    """Return ``prompt`` and its continuation by the release, loaded in a fresh process without
    pmp_ds.

    Greedy, or sampled from ``seed``. Raises UserError when tensors of the release are missing or
    unknown, and RuntimeError when it does not load.
    """
    open_source(release).close()
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
    """Return `5GB` as 5000000000; only whole numbers of KB, MB or GB are accepted (UserError)."""
    if isinstance(size, int):
        return size
    number, unit = size[:-2].strip(), size[-2:].upper()
    if not number.isdecimal() or int(number) < 1 or unit not in _UNITS:
        raise UserError(f"max-shard-size={size!r} is not a size such as 500MB or 5GB")
    return int(number) * _UNITS[unit]


def _digest(source: Source) -> str:
    """Read all weights once, so that non-finite ones are found before anything is written."""
    with Progress("weights", "element", source.num_params, scale=True) as bar:
        return source.digest(bar.update)


def _released_digest(folder: Path, source: Source, digest: str, dtype: str) -> str:
    if source.dtype == PRECISIONS[dtype].dtype:
        return digest
    released = open_source(folder)
    try:
        return released.digest()
    finally:
        released.close()


def _refuse_rounded(source: Source, dtype: str) -> None:
    """Refuse fp32 or fp16 if any part of the weights was ever rounded to 16 bits."""
    stored = next(one.name for one in PRECISIONS.values() if one.dtype == source.dtype)
    if stored not in (dtype, "fp32"):
        raise UserError(
            f"dtype={dtype} is refused: {source.folder} contains {stored} weights, and in {dtype} "
            "their low bits could show which parameters were trained: export bf16"
        )
    if stored != "fp32":
        return
    counts = Rounded(FP16_BITS), Rounded(BF16_BITS)
    for name in source.shapes.keys() - source.constants:
        tensor = source.tensor(name, torch.float32)
        for count in counts:
            count.add(tensor)
    if any(count.found for count in counts):
        raise UserError(
            f"dtype={dtype} is refused: a part of {source.folder} was once rounded to 16 bits, "
            f"and {dtype} would show which: export bf16"
        )


def write_model(
    source: Source, folder: Path, dtype: str, limit: int, *, quiet: bool = False
) -> dict[str, str]:  # file -> sha256
    """Write weights in files of at most ``limit`` bytes, and the configs that transformers needs.
    Returns the sums of the weights."""
    config = release_config(source.config, PRECISIONS[dtype].torch_name)
    (folder / "config.json").write_text(as_json(config), encoding="utf-8")
    generation = as_json(generation_config(source.config, end_of_text(source.config)))
    (folder / "generation_config.json").write_text(generation, encoding="utf-8")
    return _write_weights(source, folder, dtype, limit, quiet)


def _write_weights(
    source: Source, folder: Path, dtype: str, limit: int, quiet: bool
) -> dict[str, str]:
    """Write shards greedily in the model's order, with one parameter in memory at a time."""
    shards: list[list[str]] = [[]]
    size = 0
    for name in source.shapes:
        nbytes = source.nbytes(name, PRECISIONS[dtype].dtype)
        if shards[-1] and size + nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    sums: dict[str, str] = {}
    files: dict[str, str] = {}
    total = sum(map(source.numel, source.shapes))
    with Progress("export", "element", total, scale=True, disable=quiet) as bar:

        def tensor(name: str) -> torch.Tensor:
            bar.update(source.numel(name))
            return source.tensor(name, PRECISIONS[dtype].dtype)

        for number, names in enumerate(shards, start=1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            if len(shards) == 1:
                file = SINGLE_FILE
            shapes = {name: source.shapes[name] for name in names}
            dtypes = {name: source.released_dtype(name, PRECISIONS[dtype].dtype) for name in names}
            sums[file] = write_tensors(folder / file, shapes, dtypes, tensor)
            files |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": _total_bytes(source, dtype)},
            "weight_map": files,
        }
        (folder / INDEX_FILE).write_text(as_json(index), encoding="utf-8")
    return sums


def _total_bytes(source: Source, dtype: str) -> int:
    return sum(source.nbytes(name, PRECISIONS[dtype].dtype) for name in source.shapes)


def _write_sums(folder: Path, written: dict[str, str]) -> None:
    """Write SHA256SUMS, with the sums of the written weights; ``require_clean`` reads the files
    back."""
    lines = [
        f"{written.get(path.name) or sha256(path)}  {path.name}\n"
        for path in sorted(folder.iterdir())
    ]
    (folder / SUMS_FILE).write_text("".join(lines), encoding="utf-8")


def _seal(folder: Path, private: bool, date: str) -> tuple[str, ...]:
    """Set modes, use the day as time, and flush everything; return the sorted names."""
    day = datetime.datetime.fromisoformat(date).replace(tzinfo=datetime.UTC).timestamp()
    names = sorted(path.name for path in folder.iterdir())
    for name in names:
        path = folder / name
        path.chmod(0o600 if private else 0o644)
        os.utime(path, (day, day))
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    fsync_dir(folder)
    return tuple(names)
