"""The benchmarks run and print their figures; tests do not judge the figures."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import __main__ as bench
from benchmarks import discovery, step
from benchmarks.common import arguments
from benchmarks.parts import Machine, Part, parts
from pmp_ds.prepare.tokenizer import train_tokenizer
from pmp_ds.run_dir import RunDir
from pmp_ds.ticket.ticket import load_ticket
from tests.pretend.job import write_store
from tests.unit.prepare.conftest import make_texts

pytestmark = pytest.mark.processes

REPO = Path(__file__).resolve().parents[2]
FIGURE = re.compile(r"^figure (\w+) \d+\.\d+ goal <= \d+\.\d+ (?:met|short)$", re.MULTILINE)


@pytest.mark.parametrize(
    ("command", "figures"),
    [
        (
            ["benchmarks.optimizer_step", "--without-deepspeed"],
            [
                "optimizer_step_vs_torch_fused",
                "optimizer_phase_vs_torch_passes",
                "optimizer_phase_of_copy_bandwidth",
                "optimizer_state_vs_torch_fused",
            ],
        ),
        (
            ["benchmarks.topk"],
            [
                "topk_fp32_vs_kthvalue",
                "topk_fp32_vs_topk",
                "topk_fp32_vs_sort",
                "topk_fp32_ms",
                "topk_bf16_vs_kthvalue",
                "topk_bf16_vs_topk",
                "topk_bf16_vs_sort",
                "topk_bf16_ms",
            ],
        ),
    ],
)
@pytest.mark.nightly
def test_benchmark_prints_its_figures(command, figures):
    result = subprocess.run(
        [sys.executable, "-m", *command, "--numel", "5000", "--repeats", "1", "--device", "cpu"],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert names(result.stdout) == figures
    assert re.search("^hardware: .+", result.stdout, re.MULTILINE)


def names(output: str) -> list[str]:
    """Return the names of all figures, with a goal or without."""
    return [figure[0] for figure in bench.FIGURE.findall(output)]


AT_LEAST = re.compile(r"^figure (\w+) \d+\.\d+ goal >= \d+(?:\.\d+)? (?:met|short)$", re.MULTILINE)


def run_benchmark(*command: str) -> str:
    result = subprocess.run(
        [sys.executable, "-m", *command], cwd=REPO, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert re.search("^hardware: .+", result.stdout, re.MULTILINE)
    return result.stdout


@pytest.mark.nightly
def test_reading_benchmark(tmp_path: Path):
    arguments = ("--blocks", "500", "--steps", "10", "--repeats", "1", "--folder", str(tmp_path))
    output = run_benchmark("benchmarks.data_read", *arguments, "--megatron", "/no/such/python")
    assert "--megatron /no/such/python cannot import megatron-core: left out" in output
    found = AT_LEAST.findall(output)
    assert found == ["read_speed_vs_memmap", "read_speed_vs_datasets", "cold_read_speed_vs_memmap"]


@pytest.mark.nightly
def test_preparation_benchmark(tmp_path: Path):
    pytest.importorskip("gigatoken")
    train_tokenizer(make_texts(200), 400).save_pretrained(tmp_path / "tokenizer")
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in make_texts(3000)))
    output = run_benchmark(
        "benchmarks.data_prepare",
        "--input",
        str(path),
        "--tokenizer",
        str(tmp_path / "tokenizer"),
        "--workers",
        "1",
        "--proof",
        "--peers",
        "nonsense",
        "datasets",
    )
    assert AT_LEAST.findall(output) == ["prepare_speed_vs_reference", "prepare_speed_vs_datasets"]
    assert re.search(r"^prepare_speed_vs_engine \d+\.\d+$", output, re.MULTILINE)
    assert "made the same store as tokenizers" in output
    assert re.search("^nonsense +did not run: ", output, re.MULTILINE)
    output = run_benchmark(
        "benchmarks.data_memory",
        "--input",
        str(path),
        "--gigabytes",
        "0.005",
        "--tokenizer",
        str(tmp_path / "tokenizer"),
        "--folder",
        str(tmp_path),
    )
    assert FIGURE.findall(output) == ["prepare_peak_gigabytes"]


@pytest.mark.nightly
def test_export_benchmark(tmp_path: Path):
    output = run_benchmark(
        "benchmarks.export",
        "--folder",
        str(tmp_path),
        "--model.num_layers",
        "1",
        "--model.hidden_size",
        "64",
        "--model.intermediate_size",
        "64",
        "--model.num_heads",
        "4",
        "--model.num_kv_heads",
        "4",
    )
    assert FIGURE.findall(output) == ["export_peak_gb", "export_time_vs_copy"]
    assert not list(tmp_path.glob("runs/*"))


STEP = [
    "step_tokens_per_second",
    *(
        f"step_{figure}_vs_{rival}"
        for rival in ("deepspeed", "torch", "ours_dense")
        for figure in ("speed", "cpu_time", "optimizer", "peak_memory")
    ),
]
RIVALS = ("--rivals", "deepspeed", "torch", "ours-dense")


@pytest.mark.parametrize(
    ("ranks", "options"), [(1, ()), (2, ("--micro-batch", "1")), (1, ("--offload",))]
)
@pytest.mark.nightly  # DeepSpeed compiles its optimizer once
def test_benchmark_of_whole_updates(ranks: int, options: tuple[str, ...]):
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m")
    command = ("benchmarks.step", "--shape", "tiny", "--repeats", "1", *RIVALS, *options)
    output = run_benchmark(*(launcher if ranks > 1 else ()), *command)
    assert names(output) == STEP  # once, not for each rank
    table = re.findall(r"^(ours|DeepSpeed|torch).*?((?: +[\d,.]+){6})$", output, re.MULTILINE)
    assert [title for title, _ in table] == ["ours", "DeepSpeed", "torch", "ours"]
    for _, numbers in table:
        rate, ms, backward, stepping, cpu, _ = (float(n.replace(",", "")) for n in numbers.split())
        assert min(rate, backward, stepping, cpu) > 0
        assert rate == pytest.approx(4 * 16 / ms * 1e3, rel=0.02)


@pytest.mark.nightly
def test_checkpoint_benchmark(tmp_path: Path):
    small = ("--hidden-size", "64", "--repeats", "1", "--folder", str(tmp_path))
    output = run_benchmark("benchmarks.checkpoint", *small)
    stalls = [f"background_stall_vs_{other}" for other in ("at_once", "deepspeed")]
    assert names(output) == ["checkpoint_bytes_vs_dense", *stalls]


@pytest.mark.nightly
def test_memory_benchmark():
    output = run_benchmark("benchmarks.memory", "--layers", "1")
    states = ("dense_fp32", "compact_fp32", "split_bf16", "dense_int8")
    assert names(output) == [*(f"states_{one}" for one in states), "peak_split_bf16_vs_dense"]
    assert "failed" not in output


@pytest.mark.nightly
def test_losses_with_fewer_bits(tmp_path: Path):
    write_store(tmp_path / "store")
    command = ("benchmarks.losses", "--shape", "tiny", "--store", str(tmp_path / "store"))
    numbers = ("--keys", "1", "--updates", "2", "--batch", "4", "--precision", "fp32")
    output = run_benchmark(*command, *numbers, "--folder", str(tmp_path / "runs"))
    arms = ("fp32", "bf16", "int8", "control")
    assert names(output) == [f"losses_{arm}_from_fp32" for arm in arms[1:]]
    runs = [RunDir(tmp_path / "runs" / f"{arm}-1") for arm in arms]
    ids = {load_ticket(run.ticket).id for run in runs}
    assert len(ids) == 1, "they were not trained on the same ticket"
    assert len({file_of(run).read_bytes() for run in runs}) == len(arms)


def file_of(run: RunDir) -> Path:
    (found,) = run.checkpoints.glob("update-*/manifest.json")
    return found


@pytest.mark.nightly
def test_benchmark_of_discovery():
    output = run_benchmark("benchmarks.discovery", "--shape", "tiny", "--repeats", "1")
    figures = ["discovery_update_vs_ordinary", "discovery_cpu_time_vs_ordinary"]
    assert names(output) == figures


@pytest.mark.nightly
def test_all_benchmarks_in_one_table(tmp_path: Path):
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--tiny", "--folder", str(tmp_path)],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (file,) = tmp_path.glob("*.md")
    text = file.read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in row.split("|")] for row in re.findall(r"^\| .*$", text, re.M)]
    found = {row[2] for row in rows}
    assert {"copy_gb_per_second", "matmul_tflops", *names(result.stdout)} <= found
    assert {"step_speed_vs_deepspeed", "discovery_update_vs_ordinary", "topk_fp32_ms"} <= found
    assert text[text.index("| part") : text.index("\n\n## ")] in result.stdout


def printing(figure: str, code: int = 0) -> Part:
    return Part(figure, (sys.executable, "-c", f"print('figure {figure} 1.50'); exit({code})"))


def test_a_part_that_fails_does_not_end_the_others(monkeypatch, tmp_path, capfd):
    first = [printing("good"), printing("bad", code=3), printing("last")]
    monkeypatch.setattr(bench, "parts", lambda machine, tiny: first)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--folder", str(tmp_path)])
    assert bench.main(bench.arguments().parse_args()) == 1
    output = capfd.readouterr().out
    assert "[3/3] last" in output
    assert "2 of 3 parts ran to their end" in output
    assert output.rstrip().endswith("not: bad (exit code 3)")
    (file,) = tmp_path.iterdir()
    assert "| last | last | 1.50 |  |  |" in file.read_text()
    assert "| bad | exit code 3 | | | |" in file.read_text()


def test_a_part_without_an_end_is_ended_with_its_children(monkeypatch):
    monkeypatch.setattr(bench, "LEAST_SECONDS", 0)
    monkeypatch.setattr(bench, "END_SECONDS", 2)  # what was started with SIGINT ignored
    endless = (
        "import subprocess; print('figure a 1.00', flush=True); subprocess.run(['sleep', '600'])"
    )
    outcome = bench.run(Part("endless", (sys.executable, "-c", endless)), 3)
    assert outcome.fault == "ended after 3 seconds"
    assert bench.run(printing("b"), -1).fault == "no time left"
    assert bench.run(printing("c"), 60).fault == ""


GB = 10**9
MACHINES = [Machine(gpus, size * GB) for gpus, size in [(0, 0), (1, 24), (1, 80), (8, 141)]]


@pytest.mark.parametrize("machine", MACHINES, ids=str)
def test_the_parts_of_every_machine_take_their_options(machine: Machine):
    chosen = parts(machine, tiny=False)
    assert {"rates", "step", "discovery", "optimizer_step", "topk"} <= {
        part.name.split()[0] for part in chosen
    }
    assert len({part.name for part in chosen}) == len(chosen)
    parsers = {"step": step.arguments(), "discovery": discovery.arguments()}
    for part in chosen:
        module = next(word for word in part.command if word.startswith("benchmarks."))
        options = part.command[part.command.index(module) + 1 :]
        parser = parsers.get(module.partition(".")[2], arguments("of flat tensors"))
        parser.parse_args(options)


def test_a_large_gpu_runs_the_models_of_the_goals():
    names = [part.name for part in parts(MACHINES[-1], tiny=False)]
    assert {"step tinyllama-1.1b 32x256", "step tinyllama-1.1b 8x2048"} <= set(names)
    assert "topk numel 1100000000" in names
