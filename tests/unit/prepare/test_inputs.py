"""Every kind of input gives the same documents; large files are divided without losing a line."""

import dataclasses
import gzip
import json
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pmp_ds.cli import parse
from pmp_ds.data.arrow_store import Store
from pmp_ds.errors import UserError
from pmp_ds.prepare import streams
from pmp_ds.prepare.config import PrepareConfig
from pmp_ds.prepare.corpus import Rejects, StreamOptions, Unfinished, group_units
from pmp_ds.prepare.inputs import find_sources
from pmp_ds.prepare.packing import is_validation, pack_ref
from pmp_ds.prepare.prepare import prepare
from pmp_ds.prepare.readers import read_documents, read_texts
from pmp_ds.prepare.tokenizer import load_tokenizer
from tests.unit.prepare.conftest import make_texts

TEXTS = make_texts(60)
LINES = "\n".join(json.dumps({"text": text, "id": i}) for i, text in enumerate(TEXTS)).encode()


def zstd(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)


def write(folder: Path, name: str) -> Path:
    path = folder / name
    if name.endswith(".parquet"):
        pq.write_table(pa.table({"id": range(60), "text": TEXTS}), path, row_group_size=7)
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(LINES))
    else:
        path.write_bytes(zstd(LINES) if name.endswith(".zst") else LINES)
    return path


def documents(*inputs: str, field: str = "text", **options) -> list[str]:
    sources = find_sources(inputs, StreamOptions(**options))
    return [text for s in sources for text in read_texts(s, field, Rejects())]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_formats_agree(tmp_path: Path, name: str):
    path = write(tmp_path, name)
    assert documents(str(path)) == TEXTS
    assert documents(f"{tmp_path}/*.{name.partition('.')[2]}") == TEXTS
    assert documents(f"file://{path}") == TEXTS


def test_several_zstd_frames_and_a_truncated_one(tmp_path: Path):
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstd(LINES + b"\n") + zstd(LINES))
    assert documents(str(path)) == TEXTS * 2
    path.write_bytes(zstd(LINES)[:-200])
    with pytest.raises(UserError, match=r"a\.jsonl\.zst cannot be read"):
        documents(str(path))


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
@pytest.mark.parametrize("unit_bytes", [700, 5_000, 20_000])
def test_parts_are_the_whole(tmp_path: Path, name: str, unit_bytes: int):
    source = find_sources([str(write(tmp_path, name))])
    units = group_units(source, unit_bytes)
    assert len(units) > 1
    assert sum(unit.num_bytes for unit in units) == source[0].num_bytes
    found: list[str] = []
    seen: list[int] = []
    for unit in units:
        (part,) = unit.sources
        found += [t.decode() for t in read_documents(part, "text", Rejects(), seen.append)]
    assert found == TEXTS
    assert sum(seen) == source[0].num_bytes


def test_compressed_files_and_texts_stay_whole(tmp_path: Path):
    (tmp_path / "b.txt").write_text("x" * 900)
    write(tmp_path, "a.jsonl.gz")
    assert len(group_units(find_sources([str(tmp_path)]), 100)) == 2


def test_bad_row_of_a_part_has_its_line_in_the_file(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINES + b"\n{\n" + LINES)
    rejects = Rejects(max_malformed=1.0)
    for unit in group_units(find_sources([str(path)]), 3000):
        list(read_documents(unit.sources[0], "text", rejects))
    assert rejects.examples == {"not JSON": f"{path}:61"}
    assert rejects.rows == 121


def test_bad_rows_of_a_parquet_file(tmp_path: Path):
    path = tmp_path / "a.parquet"
    bad = pa.array([b"one", b" ", b"\xff", None], pa.binary())
    pq.write_table(pa.table({"text": bad}), path)
    rejects = Rejects(max_malformed=1.0)
    (source,) = find_sources([str(path)])
    assert list(read_texts(source, "text", rejects)) == ["one"]
    assert rejects.examples == {
        "empty document": f"{path}:2",
        "invalid UTF-8": f"{path}:3:1",
    }
    assert rejects.empty == 2, "a null is an empty document"
    with pytest.raises(UserError, match="no column 'body', only text"):
        list(read_documents(source, "body", rejects))
    pq.write_table(pa.table({"text": [1, 2]}), path)
    with pytest.raises(UserError, match="has type int64, not text"):
        documents(str(path))


def test_urls_of_any_file_system(tmp_path: Path):
    memory = fsspec.filesystem("memory")
    for name in ("b.jsonl", "a.jsonl", "c.md"):
        memory.pipe(f"/corpus/{name}", LINES)
    names = [source.name for source in find_sources(["memory://corpus"])]
    assert names == ["memory:///corpus/a.jsonl", "memory:///corpus/b.jsonl"]
    assert documents("memory://corpus/*.jsonl") == TEXTS * 2
    parts = group_units(find_sources(["memory://corpus/a.jsonl"]), 3000)
    assert [t for u in parts for t in read_texts(u.sources[0], "text", Rejects())] == TEXTS
    for given, message in (
        ("memory://none.jsonl", "memory://none.jsonl cannot be read"),
        ("memory://corpus/c.md", "is not a .txt"),
        ("memory://corpus/*.txt", "contains no .txt"),
        ("nonsense://x.jsonl", "nonsense"),
    ):
        with pytest.raises(UserError, match=message):
            find_sources([given])
    with pytest.raises(UserError, match="matches no"):
        find_sources([f"{tmp_path}/*.txt"])


@pytest.fixture(autouse=True)
def no_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    """After every stream `datasets` sleeps 5 s, for threads that would disturb the interpreter's
    end."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.01)


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    (tmp_path / "dataset").mkdir()
    write(tmp_path / "dataset", "train.parquet")
    return f"hf:{tmp_path}/dataset"


def config(dataset: str, tmp_path: Path, **changes) -> PrepareConfig:
    settings: dict = {
        "input": (dataset,),
        "out": str(tmp_path / "out"),
        "train_vocab_size": 400,
        "block_size": 16,
        "val_fraction": 0.2,
        "workers": 1,
    }
    return PrepareConfig(**(settings | changes))


def test_dataset_of_hugging_face_as_a_stream(dataset: str, tmp_path: Path, monkeypatch):
    """The same loader that reads the hub reads a folder."""
    assert documents(dataset) == TEXTS  # the sample: not shuffled
    spool_units = streams.spool_units

    def small(source, index, folder, field, rejects):
        return spool_units(source, index, folder, field, rejects, 8000)

    monkeypatch.setattr("pmp_ds.prepare.streams.spool_units", small)
    first = prepare(config(dataset, tmp_path))
    shards = first.manifest["splits"]["train"]["shards"]
    assert len(shards) > 3
    assert first.manifest["rows"]["read"] == 60
    assert sum(s["documents"] for s in first.manifest["splits"].values()) == 60
    assert first.manifest["settings"]["stream"]["shuffle_buffer"] == 50_000
    assert not {"spool", "units"} & {path.name for path in first.folder.iterdir()}
    again = prepare(config(dataset, tmp_path, out=str(tmp_path / "again")))
    assert again.manifest == first.manifest
    other = prepare(config(dataset, tmp_path, out=str(tmp_path / "other"), shuffle_seed=1))
    assert other.manifest["dataset_id"] != first.manifest["dataset_id"]
    with pytest.raises(UserError, match="contains another store"):
        prepare(config(dataset, tmp_path, shuffle_seed=1))
    Store.open(first.folder, verify=True)


def test_stream_that_breaks_off_goes_on(dataset: str, tmp_path: Path, monkeypatch):
    spool_units = streams.spool_units
    next_unit: list[int] = []

    def breaking(source, index, folder, field, rejects):
        for unit in spool_units(source, index, folder, field, rejects, 8000):
            if unit.index == 2 and not next_unit:
                next_unit.append(2)
                raise Unfinished("the network is gone")
            yield unit

    monkeypatch.setattr("pmp_ds.prepare.streams.spool_units", breaking)
    with pytest.raises(Unfinished):
        prepare(config(dataset, tmp_path))
    assert len(list((tmp_path / "out.incomplete" / "units").glob("*.json"))) == 2
    summary = prepare(config(dataset, tmp_path))
    reference = prepare(config(dataset, tmp_path, out=str(tmp_path / "reference")))
    assert summary.manifest == reference.manifest


def test_bad_rows_of_a_stream_count_and_stop(tmp_path: Path):
    (tmp_path / "dataset").mkdir()
    rows = [{"text": text} for text in TEXTS] + [{"text": None}, {"text": " "}, {"other": 1}]
    (tmp_path / "dataset" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    dataset = f"hf:{tmp_path}/dataset"
    with pytest.raises(UserError, match=r"2 of 63 rows are malformed.*2 x field 'text' is not a"):
        prepare(config(dataset, tmp_path, shuffle_buffer=0))
    summary = prepare(config(dataset, tmp_path, shuffle_buffer=0, max_malformed=0.04))
    assert summary.manifest["rows"] == {
        "read": 63,
        "malformed": 2,
        "empty": 1,
        "rejected": [
            f"2 x field 'text' is not a string (first: {dataset}:61)",
            f"1 x empty document (first: {dataset}:62)",
        ],
    }


def test_bad_rows_of_a_stream_are_judged_with_all_its_rows(tmp_path: Path):
    (tmp_path / "dataset").mkdir()
    good = [json.dumps({"text": text[:40]}) for text in TEXTS[:25]]
    rows = [row for i in range(1100) for row in (*good, '{"text": null}')[i % 2 :]]
    (tmp_path / "dataset" / "train.jsonl").write_text("\n".join(rows))
    given = config(f"hf:{tmp_path}/dataset", tmp_path, shuffle_buffer=0, max_malformed=0.05)
    found = prepare(given).manifest["rows"]
    assert (found["read"], found["malformed"]) == (len(rows), 1100)


@pytest.mark.parametrize("names", ["ab", "ba", "aa"])
def test_one_bad_part_is_judged_with_all_rows(tmp_path: Path, names: str):
    """Also when it comes first, and at the head of the only file."""
    folder = tmp_path / "in"
    folder.mkdir()
    for name, rows in zip(names, (b'{"body": "x"}\n' * 1200, (LINES + b"\n") * 300), strict=True):
        with open(folder / f"{name}.jsonl", "ab") as file:
            file.write(rows)
    given = config("", tmp_path, input=(str(folder),), max_malformed=0.07)
    assert prepare(given).manifest["rows"]["malformed"] == 1200
    with pytest.raises(UserError, match="1200 of 19200 rows are malformed"):
        prepare(dataclasses.replace(given, out=str(tmp_path / "strict"), max_malformed=0.06))


@pytest.mark.parametrize("kind", ["file", "files", "stream"])
def test_a_wrong_text_field_stops_before_everything_is_read(tmp_path: Path, kind: str):
    folder = tmp_path / "in"
    folder.mkdir()
    number = 4 if kind == "files" else 1
    for i in range(number):
        (folder / f"{i}.jsonl").write_bytes(b'{"body": "x"}\n' * (100_000 // number))
    name = f"hf:{folder}" if kind == "stream" else str(folder)
    with pytest.raises(UserError, match=r"32000 of 32000 rows.*no field 'text'.*text_field"):
        prepare(config("", tmp_path, input=(name,)))


def test_unknown_dataset_is_one_line(tmp_path: Path, dataset: str):
    with pytest.raises(UserError, match=r"hf:.*none cannot be opened"):
        documents(f"hf:{tmp_path}/none")
    with pytest.raises(UserError, match="hf_split='test'"):
        documents(dataset, split="test")
    with pytest.raises(UserError, match="names no dataset"):
        find_sources(["hf:"])


def test_threshold_is_the_users(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINES + b"\n{\n{\n{")
    arguments = {"input": (str(path),)}
    with pytest.raises(UserError, match=r"3 of 63 rows.*at most 0.04 of them.*max_malformed"):
        prepare(config("", tmp_path, **arguments, max_malformed=0.04))
    summary = prepare(config("", tmp_path, **arguments, max_malformed=0.05))
    assert summary.manifest["rows"]["malformed"] == 3


RECIPE = Path(__file__).parents[3] / "launcher/recipes/data-slimpajama-6b.yaml"


def test_recipe_of_the_papers_corpus():
    found, _ = parse(PrepareConfig, ["--config", str(RECIPE), "--tokenizer", "llama"])
    assert found.input == ("hf:DKYoon/SlimPajama-6B",)
    assert (found.shuffle_buffer, found.block_size, found.text_field) == (50_000, 256, "text")


def test_recipe_runs_on_a_dataset_laid_out_like_it(tmp_path: Path, tokenizer_paths):
    """The command of the recipe, but for the dataset's name; as many splits, columns and files."""
    folder = tmp_path / "SlimPajama-6B" / "data"
    folder.mkdir(parents=True)
    texts = make_texts(300)
    for number, (split, part) in enumerate(
        [
            ("train", texts[:100]),
            ("train", texts[100:280]),
            ("validation", texts[280:290]),
            ("test", texts[290:]),
        ]
    ):
        table = pa.table(
            {
                "text": part,
                "meta": [{"redpajama_set_name": "RedPajamaC4"}] * len(part),
                "__index_level_0__": range(len(part)),
            }
        )
        pq.write_table(table, folder / f"{split}-{number:05d}-of-00004-0123456789abcdef.parquet")
    name, tokenizer = str(folder.parent), str(tokenizer_paths["byte-bpe"])
    arguments = [
        "--config",
        str(RECIPE),
        "--input",
        f"hf:{name}",
        "--tokenizer",
        tokenizer,
        "--out",
        str(tmp_path / "out"),
        "--val_fraction",
        "0.1",
    ]
    summary = prepare(parse(PrepareConfig, arguments)[0])
    rows = datasets.load_dataset(name, split="train", streaming=True)
    shuffled = [row["text"] for row in rows.shuffle(seed=0, buffer_size=50_000)]
    assert sorted(shuffled) == sorted(texts[:280])
    assert shuffled != texts[:280]
    chosen = [text for text in shuffled if not is_validation(text.encode(), 0.1)]
    reference = load_tokenizer(tokenizer)
    ids = [ids.tolist() for ids in reference.encode_batch(chosen)]
    blocks, _ = pack_ref(ids, 256, reference.eos_id)
    found = Store.open(summary.folder, verify=True).split("train")
    assert found.gather(np.arange(len(found))).tolist() == blocks
