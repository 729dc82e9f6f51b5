"""`pmp-ds pretrain --dry-run`: what it prints without data, and that it leaves nothing behind."""

import re
import resource
from pathlib import Path

import pytest

from pmp_ds.cli import parse
from pmp_ds.config import Config
from pmp_ds.errors import UserError
from pmp_ds.train import dry_run
from pmp_ds.train.machine import bytes_of, flops_of
from tests.helpers.commands import call, error_of, ok
from tests.pretend.job import write_store

SEVENTY_BILLION = (
    "--model.hidden_size=8192",
    "--model.num_layers=80",
    "--model.num_heads=64",
    "--model.num_kv_heads=8",
    "--model.intermediate_size=28672",
    "--model.max_positions=4096",
    "--train.global_batch_size=1024",
)


def said(folder: Path, *flags: str, recipe: str = "demo") -> str:
    done = call("pretrain.py", "--config", recipe, "--dry-run", *flags, cwd=folder)
    assert list(folder.iterdir()) == [], "it wrote something"
    return ok(done).stdout


def table_of(text: str, title: str) -> dict[str, dict[str, float]]:
    """The bytes of the table under ``title``, by row and column."""
    head, *rows = text[text.index(f"  {title}") :].partition("\n\n")[0].splitlines()
    unit = {"MB": 1e6, "GB": 1e9}[head.split(",")[-1].split()[0]]
    heads = head.split(",")[-1].split()[1:]
    found = {}
    for row in rows:
        values = row.split()[-len(heads) :]
        name = row.strip().partition("  ")[0]
        if not name.startswith("fits"):
            numbers = (0.0 if v == "-" else unit * float(v.replace(",", "")) for v in values)
            found[name] = dict(zip(heads, numbers, strict=True))
    return found


def test_a_run_without_data(tmp_path):
    flags = ("--deepspeed-config", "zero2", "--world-size", "8", "--device-memory", "80GB")
    text = said(tmp_path, *flags, "--train.micro_batch_size", "auto")
    d = 2 * 32_000 * 128 + 4 * (2 * 128**2 + 2 * 64 * 128 + 3 * 352 * 128 + 2 * 128) + 128
    for line in (
        "demo: a dry run; nothing is trained or written",
        "2 sequences x 1 accumulation step x 8 ranks = 16 sequences x 256 tokens = 4,096 tokens",
        f"parameters d = {d:,}",
        "DeepSpeed ZeRO 2, 8 ranks, fp32, a GPU each",
        "no store at tokenized_data/demo yet: a vocabulary of 32,000 (llama's own;",
        "train.micro_batch_size=auto: what fits",
        "smallest that fits: ZeRO 0 with the settings as they are, micro-batch 2",
    ):
        assert line in text
    assert max(map(len, text.splitlines())) <= 100
    table = table_of(text, "device memory of a rank")
    assert list(table["weights"]) == ["start", "discovery", "training", "save", "resume"]
    assert list(table["weights"].values()) == pytest.approx(5 * [4 * d], abs=5e6)
    for phase, total in table.pop("total").items():
        assert sum(row[phase] for row in table.values()) == pytest.approx(total, abs=3e7)


def test_settings_change_the_numbers(tmp_path):
    title = "device memory of a rank"
    shape = ("--model.vocab_size", "1024", "--block-size", "128")
    flags = ("--world-size", "2", "--train.precision", "bf16", *shape)
    plain = said(tmp_path, *flags)
    lean = said(tmp_path, *flags, "--train.moments", "bf16", "--mask.source", "none")
    full = said(tmp_path, *flags, "--train.activation_checkpointing", "full")
    texts = {"plain": plain, "lean": lean, "full": full}
    assert "= 16 sequences x 128 tokens" in plain
    assert "discovery" in plain
    assert "discovery" not in lean
    d = float(re.findall(r"d = ([\d,]+)", plain)[0].replace(",", ""))
    of = {name: table_of(text, title) for name, text in texts.items()}
    dense = of["lean"]["moments"]["training"]
    assert dense == pytest.approx(2 * 2 * d / 2, abs=5e6)
    assert of["plain"]["moments"]["training"] == pytest.approx(2 * 0.7 * dense, abs=2e7)
    words = "activations, logits"
    assert of["full"][words]["training"] < 0.7 * of["plain"][words]["training"]
    assert "recomputed" in full
    assert "recomputed" not in plain


def test_time_and_memory_of_a_machine(tmp_path):
    flags = ("--device-flops", "10T", "--mfu", "0.5", "--device-memory", "1MB")
    text = said(tmp_path, *flags, "--host-memory", "1TB")
    per_token = re.findall(r"([\d.e+]+) FLOP per token", text)[0]
    seconds = float(per_token) * 16 * 256 / 5e12
    assert f"at 50% of 10 TFLOP/s per rank, {seconds:.3g} s per update" in text
    assert "nothing of this fits" in text
    assert re.search(r"fits into 90% of 0.00 GB +NO +NO +NO +NO +NO\n", text)
    assert re.search(r"fits into 90% of 1,000.00 GB +yes +yes +yes +yes +yes\n", text)
    assert "one rank sends nothing" in text


def test_disk_has_room_for_every_checkpoint_that_is_kept(tmp_path):
    """20,000 updates keep all of 40 checkpoints; discovery keeps as many as training."""
    flags = ("--train.steps=20000", "--run.checkpoint_every=500", "--mask.max_steps=2000")
    for more, most, of_discovery, words in (
        ((), 3, 3, "run.keep_last=2 and one"),
        (("--run.keep_last=5",), 6, 6, "run.keep_last=5 and one"),
        (("--run.keep_every=500",), 40, 3, "run.keep_last=2, 37 more by run.keep_every=500 and"),
    ):
        text = said(tmp_path, *flags, *more)
        assert words in text
        sizes = re.findall(r"([\d.,]+) ([KMG]B)", text[text.index("  on disk") :])
        units = {"KB": 1e3, "MB": 1e6, "GB": 1e9}
        one, _, _, together, dense, dense_together, released = (
            float(number.replace(",", "")) * units[unit] for number, unit in sizes[:7]
        )
        assert together == pytest.approx(most * one, rel=0.05)
        assert dense_together == pytest.approx(of_discovery * dense, rel=0.05)
        config, _ = parse(Config, ["--config", "demo", *flags, *more])
        needed = dry_run.disk_bytes(config, {}, 1)
        assert needed == pytest.approx(max(together, dense_together) + released, rel=0.05)


def test_vocabulary_and_blocks_of_a_store(tmp_path):
    store = tmp_path / "store"
    write_store(store, vocab=512)
    flags = ("--config", "demo", "--dry-run", "--data.store", "store")
    text = ok(call("pretrain.py", *flags, cwd=tmp_path)).stdout
    assert "= 16 sequences x 64 tokens" in text
    assert "assumed" not in text
    d = 2 * 512 * 128 + 4 * (2 * 128**2 + 2 * 64 * 128 + 3 * 352 * 128 + 2 * 128) + 128
    assert f"parameters d = {d:,}" in text
    message = error_of(call("pretrain.py", *flags, "--block-size", "32", cwd=tmp_path))
    assert "--block-size 32 does not go with store, whose blocks have 64 tokens; omit it" in message


def test_a_model_that_cannot_run_without_values(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise RuntimeError("item() cannot be called on meta tensors\nmore")

    monkeypatch.setattr(dry_run, "timeline", refuse)
    text = said(tmp_path, "--init.seed", "1", "--device-memory", "1GB")
    unknown = "activations, which are not counted (llama: item() cannot be called on meta tensors)"
    assert unknown in " ".join(text.split())
    assert "largest micro-batch" not in text
    d = float(re.findall(r"d = ([\d,]+)", text)[0].replace(",", ""))
    drawn = table_of(text, "host memory of a rank")["theta(0), drawn"]["start"]
    assert drawn == pytest.approx(4 * d, abs=6e6), "paper mode draws all of it"


@pytest.mark.nightly
def test_seventy_billion_parameters_take_no_memory(tmp_path):
    said(tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    flags = ("--deepspeed-config", "zero3", "--world-size", "512", "--device-memory", "80GB")
    text = said(tmp_path, *SEVENTY_BILLION, *flags, recipe="tinyllama-1.1b")
    assert "parameters d = 68,976,648,192" in text
    assert "smallest that fits: ZeRO 3 with the change `recompute`" in text
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000  # KB


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--device-memory", "80"),
            "--device-memory '80' is not a size: write a number and a unit",
        ),
        (("--host-memory", "0GB"), "--host-memory '0GB' is not a size"),
        (
            ("--device-flops", "989"),
            "--device-flops '989' is not a rate: write a number and T or P",
        ),
        (("--world-size", "0"), "--world-size 0 must be at least 1"),
        (("--world-size", "17"), "train.global_batch_size=16 is less than one sequence for each"),
        (("--mfu", "1.5"), "--mfu 1.5 must be in (0, 1]"),
        (("--block-size", "1"), "--block-size 1 must be at least 2"),
        (("--block-size", "512"), "the data's block_size=512 exceeds the model's longest context"),
        (
            ("--train.precision", "fp16", "--deepspeed-config", "zero0"),
            "fp16 needs stage 1, 2 or 3",
        ),
    ],
)
def test_mistakes(tmp_path, flags, message):
    done = call("pretrain.py", "--config", "demo", "--dry-run", *flags, cwd=tmp_path)
    assert message in error_of(done)
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_units():
    assert bytes_of("80GB", "") == 80 * 10**9
    assert bytes_of("1.5 GiB", "") == 3 << 29
    assert bytes_of("1KiB", "") == 1024
    assert bytes_of(None, "") is None
    assert flops_of("1.98P", "") == 1.98e15
    assert flops_of("312TFLOPS", "") == 312e12
    with pytest.raises(UserError, match="is not a size"):
        bytes_of("80gb", "--device-memory")
