"""Text to packed tokens: ours against `datasets`, datatrove, Megatron-LM and the bare engine.

    python -m benchmarks.data_prepare --input corpus/*.jsonl --tokenizer path/to/tokenizer

Every contender gets the same JSON lines, vocabulary and number of processes and runs in a process
of its own; the clock starts after its imports. With --repeats, ours and the engine take turns, and
the best run of each counts. With --proof, ours also runs with the tokenizer's own library, and both
stores must be the same. Prints a table, then a line per figure; the exit code says only whether it
ran. Needs `pip install datatrove orjson megatron-core` for those peers.
"""

import argparse
import fileinput
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BLOCK = 256


def main(options: argparse.Namespace) -> None:
    import torch  # imported here, because our workers import this file too

    from benchmarks.common import hardware, print_figure

    print(f"hardware: {hardware(torch.device('cpu'))}")
    size = sum(Path(name).stat().st_size for name in options.input)
    print(f"{size / 1e6:.1f} MB of JSON lines, {options.workers} processes")
    print(f"{'':24}{'s':>8}{'CPU s':>8}{'tokens':>14}{'Mtok/s':>10}{'MB peak':>10}")
    with tempfile.TemporaryDirectory() as folder:
        runs: dict[str, dict[str, Any]] = {}
        turns = ["ours", "engine", "engine_on_files"] * options.repeats
        for name in [*turns, *(["reference"] if options.proof else []), *options.peers]:
            result = _run(name, Path(folder), options)
            if result is not None:
                if name not in runs or result["seconds"] < runs[name]["seconds"]:
                    runs[name] = result
                rate = result["tokens"] / result["seconds"]
                print(
                    f"{name:24}{result['seconds']:8.2f}{result['cpu']:8.2f}"
                    f"{result['tokens']:14,}{rate / 1e6:10.2f}{result['peak'] / 1e6:10.0f}",
                    flush=True,
                )
    if "ours" not in runs:
        raise SystemExit(1)
    if options.proof:
        assert runs["ours"]["dataset_id"] == runs["reference"]["dataset_id"]
        print(f"{runs['ours']['engine']} made the same store as {runs['reference']['engine']}")
    goals = {"reference": 1.0, "datatrove": 5.0, "megatron": 5.0, "datasets": 20.0}
    for name in (name for name in runs if name != "ours"):
        ratio = runs[name]["seconds"] / runs["ours"]["seconds"]
        if name in goals:
            print_figure(f"prepare_speed_vs_{name}", ratio, goals[name], at_least=True)
        else:
            print(f"prepare_speed_vs_{name} {ratio:.2f}")


def _run(name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any] | None:
    """Run one contender in a fresh process; return None if it cannot run here."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.data_prepare",
        "--child",
        name,
        "--folder",
        str(folder),
        "--tokenizer",
        options.tokenizer,
        "--workers",
        str(options.workers),
        "--input",
        *options.input,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{name:24}did not run: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
        return None
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _child(options: argparse.Namespace) -> None:
    import resource

    contenders = {
        "ours": _ours,
        "reference": _ours,
        "engine": _engine,
        "engine_on_files": _engine_on_files,
        "datasets": _datasets,
        "datatrove": _datatrove,
        "megatron": _megatron,
    }
    result = contenders[options.child](options)
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    peak = max(resource.getrusage(kind).ru_maxrss for kind in kinds)
    print(json.dumps({**result, "peak": peak * 1024}))


def _clock() -> Callable[[int], dict[str, Any]]:
    """Start the clock; the returned function makes the result of a contender from its token
    count."""
    start, cpu = time.perf_counter(), _cpu_seconds()
    return lambda tokens: {
        "seconds": time.perf_counter() - start,
        "cpu": _cpu_seconds() - cpu,
        "tokens": tokens,
    }


def _cpu_seconds() -> float:
    """Return the CPU seconds of this process and of the children that it has waited for."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def _ours(options: argparse.Namespace) -> dict[str, Any]:
    import awkward  # noqa: F401 - imported late by gigatoken
    import transformers.models.auto.tokenization_auto  # noqa: F401 - imported late by ours

    from pmp_ds.prepare.config import PrepareConfig
    from pmp_ds.prepare.prepare import prepare

    shutil.rmtree(f"{options.folder}/{options.child}", ignore_errors=True)  # of the last turn
    config = PrepareConfig(
        input=tuple(options.input),
        out=f"{options.folder}/{options.child}",
        tokenizer=options.tokenizer,
        engine="auto" if options.child == "ours" else "reference",
        block_size=BLOCK,
        workers=options.workers,
    )
    stop = _clock()
    summary = prepare(config)
    result = stop(summary.tokens)
    manifest = summary.manifest
    return {
        **result,
        "dataset_id": manifest["dataset_id"],
        "engine": manifest["tokenizer"]["engine"],
    }


def _texts(options: argparse.Namespace) -> list[str]:
    return [json.loads(line)["text"] for line in _lines(options)]


def _lines(options: argparse.Namespace) -> list[bytes]:
    return [
        line for name in options.input for line in Path(name).read_bytes().splitlines(keepends=True)
    ]


def _engine(options: argparse.Namespace) -> dict[str, Any]:
    """Run the fast engine alone, on all cores, over text that is in memory."""
    import awkward  # noqa: F401 - imported late by gigatoken
    import gigatoken

    from pmp_ds.prepare.tokenizer import load_tokenizer

    texts = _texts(options)
    description = load_tokenizer(options.tokenizer).encoder.spec.fast
    assert description is not None
    engine = gigatoken.Tokenizer.from_json(description).backend
    stop = _clock()
    tokens = 0
    for first in range(0, len(texts), 500):
        tokens += len(engine.encode_batch(texts[first : first + 500]).layout.content.data)
    return stop(tokens)


def _engine_on_files(options: argparse.Namespace) -> dict[str, Any]:
    """Run the fast engine with its own reader, from the tokenizer's description and the files to
    ids in memory, as a user would who needs nothing else."""
    import awkward  # noqa: F401 - imported late by gigatoken
    import gigatoken

    from pmp_ds.prepare.tokenizer import load_tokenizer

    description = load_tokenizer(options.tokenizer).encoder.spec.fast
    assert description is not None
    stop = _clock()
    engine = gigatoken.Tokenizer.from_json(description)
    ids = engine.encode_files(gigatoken.JsonlFileSource(options.input, field="text"))
    return stop(len(ids.layout.content.data))


def _saved(options: argparse.Namespace) -> str:
    """Save the tokenizer as a folder that `transformers` reads."""
    return f"{options.folder}/ours/tokenizer"


def _datasets(options: argparse.Namespace) -> dict[str, Any]:
    """Follow run_clm.py of `transformers`: map the tokenizer, then map group_texts."""
    import datasets
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(_saved(options))
    cache = f"{options.folder}/cache"

    def group_texts(examples: Any) -> dict[str, Any]:
        joined = {key: [i for row in rows for i in row] for key, rows in examples.items()}
        total = len(joined["input_ids"]) // BLOCK * BLOCK
        out = {
            key: [ids[i : i + BLOCK] for i in range(0, total, BLOCK)] for key, ids in joined.items()
        }
        return {**out, "labels": out["input_ids"].copy()}

    def tokenize(examples: Any) -> Any:
        return tokenizer(examples["text"])

    stop = _clock()
    rows = datasets.load_dataset("json", data_files=options.input, split="train", cache_dir=cache)
    number = options.workers if options.workers > 1 else None
    rows = rows.map(tokenize, batched=True, num_proc=number, remove_columns=rows.column_names)
    packed = rows.map(group_texts, batched=True, num_proc=number)
    return stop(len(packed) * BLOCK)


def _datatrove(options: argparse.Namespace) -> dict[str, Any]:
    """Run datatrove's own tokenizer step under its local executor."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    corpus, out = Path(options.folder, "datatrove_in"), Path(options.folder, "datatrove")
    corpus.mkdir()
    lines = _lines(options)
    for part in range(options.workers):  # one file per task, because it does not divide files
        (corpus / f"{part}.jsonl").write_bytes(b"".join(lines[part :: options.workers]))
    del lines
    eos = json.loads(Path(_saved(options), "tokenizer_config.json").read_text())["eos_token"]
    step = DocumentTokenizer(
        output_folder=str(out),
        tokenizer_name_or_path=f"{_saved(options)}/tokenizer.json",
        eos_token=eos,
        shuffle_documents=False,
    )
    executor = LocalPipelineExecutor(
        [JsonlReader(str(corpus)), step],
        tasks=options.workers,
        workers=options.workers,
        logging_dir=f"{options.folder}/logs",
    )
    stop = _clock()
    executor.run()
    result = stop(0)
    width = (
        2
        if len(json.loads(Path(_saved(options), "tokenizer.json").read_text())["model"]["vocab"])
        < 1 << 16
        else 4
    )
    return {**result, "tokens": sum(f.stat().st_size for f in out.glob("*.ds")) // width}


def _megatron(options: argparse.Namespace) -> dict[str, Any]:
    """Follow tools/preprocess_data.py of Megatron-LM, with its builder and a Hugging Face
    tokenizer: a pool tokenizes line by line, this process writes one indexed data set."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    prefix = f"{options.folder}/megatron"
    stop = _clock()
    with multiprocessing.get_context("fork").Pool(
        options.workers, _megatron_start, (_saved(options),)
    ) as pool:
        vocab_size = pool.apply(_megatron_vocab_size)
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(vocab_size))
        tokens = 0
        with fileinput.input(options.input, mode="rb") as lines:
            for ids in pool.imap(_megatron_encode, lines, 32):
                builder.add_document(ids, [len(ids)])
                tokens += len(ids)
        builder.finalize(f"{prefix}.idx")
    return stop(tokens)


_megatron_tokenizer: Any = None


def _megatron_start(folder: str) -> None:
    from transformers import AutoTokenizer

    global _megatron_tokenizer
    _megatron_tokenizer = AutoTokenizer.from_pretrained(folder)


def _megatron_vocab_size() -> int:
    return len(_megatron_tokenizer)


def _megatron_encode(line: bytes) -> list[int]:
    tokenizer = _megatron_tokenizer
    ids: list[int] = tokenizer(json.loads(line)["text"]).input_ids
    return [*ids, tokenizer.eos_token_id]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="preparation of a corpus against other tools")
    parser.add_argument("--input", nargs="+", required=True, help="JSON lines with a field `text`")
    parser.add_argument("--tokenizer", required=True, help="as prepare_data takes it")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--peers", nargs="*", default=["datatrove", "megatron", "datasets"])
    parser.add_argument("--repeats", type=int, default=1, help="turns of ours and of the engine")
    parser.add_argument(
        "--proof", action="store_true", help="also make the store with the tokenizer's own library"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    _child(arguments) if arguments.child else main(arguments)
