"""Releases of tiny models: the content of the folder, what is left out, and who can open it."""

import hashlib
import json
import os
import re
import runpy
import stat
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedConfig

from benchmarks.common import peak_extra_bytes
from pmp_ds.errors import UserError
from pmp_ds.lease import hold
from pmp_ds.model.random_fill import RandomFill
from pmp_ds.release import export as export_module
from pmp_ds.release.export import export, generate_sample, shard_bytes
from pmp_ds.release.ledger import Claim, read
from pmp_ds.release.metadata import release_config
from pmp_ds.release.model_card import CardFacts, DerivativeFacts, check_metadata, render
from pmp_ds.release.rounding import BF16_BITS, FP16_BITS, Rounded
from pmp_ds.release.signing import require_signing
from pmp_ds.release.source import open_source
from pmp_ds.release.verify import verify_reload
from tests.unit.release.conftest import CARD, gpt2, llama, write_weights

ALWAYS = {
    "README.md",
    "SHA256SUMS",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
SHARD_BYTES = 10_000


@pytest.fixture(scope="module", params=["llama", "llama-tied-sharded", "gpt2"])
def released(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path
) -> tuple[Path, Path, Any]:
    """Return (weights, release, summary) of one export with all features."""
    config = gpt2() if request.param == "gpt2" else llama("tied" in request.param)
    root = tmp_path_factory.mktemp("run")
    shards = 3 if request.param == "llama" else 1
    dtype = torch.float32 if request.param == "gpt2" else torch.bfloat16
    weights = write_weights(root / "weights", config, dtype, shards)
    size = SHARD_BYTES if "sharded" in request.param else "5GB"
    out = root / "release"
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "llama":  # tests/e2e loads one in a fresh process
            patch.setattr(export_module, "verify_reload", lambda *_: 0.0)
        summary = export(weights, out, tokenizer_dir=tokenizer_dir, card=CARD, max_shard_size=size)
    return weights, out, summary


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


@pytest.mark.processes
def test_release_holds_only_what_it_should(released: tuple[Path, Path, Any]) -> None:
    weights, release, summary = released
    files = set(os.listdir(release))
    assert files == set(summary.files)
    weight_files = {name for name in files if name.endswith(".safetensors")}
    index = {"model.safetensors.index.json"} if len(weight_files) > 1 else set()
    assert files == ALWAYS | weight_files | index
    assert set(os.listdir(release.parent)) == {"weights", "release"}
    for path in release.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o644
        content = path.read_bytes()
        for private in (b"alice", b"pmp_density", b'private"', str(weights).encode()):
            assert private not in content, path.name
    for name in weight_files:
        with safe_open(release / name, "pt") as file:
            assert file.metadata() == {"format": "pt"}
    for line in (release / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((release / name).read_bytes()).hexdigest() == digest
    assert summary.logits_difference == 0.0


def test_release_is_the_weights(released: tuple[Path, Path, Any]) -> None:
    weights, release, summary = released
    expected, tensors = tensors_of(weights), tensors_of(release)
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, expected[name].to(torch.bfloat16)), name
    assert summary.num_params == sum(tensor.numel() for tensor in expected.values())
    model = AutoModelForCausalLM.from_pretrained(release)
    assert model.dtype == torch.bfloat16
    for name, param in model.named_parameters():
        assert torch.equal(param, tensors[name]), name


def test_tokenizer_gives_the_same_ids(
    released: tuple[Path, Path, Any], tokenizer_dir: Path
) -> None:
    text = "a quick brown fox; 42!"
    expected = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer = AutoTokenizer.from_pretrained(released[1])
    assert tokenizer(text)["input_ids"] == expected(text)["input_ids"]
    assert tokenizer.eos_token == "</s>"


def test_config_and_card(released: tuple[Path, Path, Any]) -> None:
    release = released[1]
    config = json.loads((release / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config["architectures"][0] in ("GPT2LMHeadModel", "LlamaForCausalLM")
    assert not any(key.startswith("_") for key in config)
    assert json.loads((release / "generation_config.json").read_text())["eos_token_id"] == 0
    card = (release / "README.md").read_text()
    assert card.startswith('---\nlibrary_name: "transformers"\n')
    for shown in ("DKYoon/SlimPajama-6B", "`corpus.jsonl`", "1,638,400", "2.5000 nats"):
        assert shown in card
    for hidden in ("density", "secret-client", "0.7"):
        assert hidden not in card


@pytest.mark.parametrize("released", ["gpt2"], indirect=True)
def test_the_snippet_of_the_card_runs(
    released: tuple[Path, Path, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Run it from the folder it came in, as a user would paste it, to a text that continues."""
    card = (released[1] / "README.md").read_text()
    snippet = re.search(r"^```python\n(.*?)^```$", card, re.MULTILINE | re.DOTALL)
    assert snippet is not None
    (tmp_path / "snippet.py").write_text(snippet[1])
    monkeypatch.chdir(released[1])
    runpy.run_path(str(tmp_path / "snippet.py"))
    text = capsys.readouterr().out.replace(" ", "").strip()
    assert text.startswith("nce")  # the tokenizer of these tests knows no capitals
    assert len(text) > len("nce")


@pytest.mark.nightly  # tests/e2e has a sample made after an export and by a report
@pytest.mark.parametrize("released", ["gpt2"], indirect=True)
@pytest.mark.processes
def test_sample_of_a_fresh_process(released: tuple[Path, Path, Any]) -> None:
    text = generate_sample(released[1], "abc", 5)
    assert text.replace(" ", "").startswith("abc")


@pytest.mark.parametrize("released", ["llama-tied-sharded"], indirect=True)
def test_shards(released: tuple[Path, Path, Any]) -> None:
    _, release, summary = released
    files = sorted(path.name for path in release.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    for file in files:
        assert sum(t.nbytes for t in load_file(release / file).values()) <= SHARD_BYTES
    index = json.loads((release / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == summary.total_bytes == 2 * summary.num_params
    for name, file in index["weight_map"].items():
        assert name in load_file(release / file)
    assert index["weight_map"].keys() == tensors_of(release).keys()


@pytest.mark.usefixtures("no_reload")
def test_private_export(tmp_path: Path, tokenizer_dir: Path) -> None:
    weights, out = write_weights(tmp_path / "weights", gpt2()), tmp_path / "init"
    export(weights, out, tokenizer_dir=tokenizer_dir, card=CARD, private=True)
    assert stat.S_IMODE(out.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()} == {0o600}


@pytest.mark.usefixtures("no_reload")
def test_a_release_in_the_making_has_one_maker(tmp_path: Path, tokenizer_dir: Path) -> None:
    weights, out = write_weights(tmp_path / "weights", gpt2()), tmp_path / "x" / "release"
    with (
        hold(out.parent, "it", prefix="release."),
        pytest.raises(UserError, match=r"the release .*release is in use by "),
    ):
        export(weights, out, tokenizer_dir=tokenizer_dir, card=CARD)
    assert not out.parent.exists()
    export(weights, out, tokenizer_dir=tokenizer_dir, card=CARD)
    assert [path.name for path in out.parent.iterdir()] == ["release"]


@pytest.mark.usefixtures("no_reload")
def test_same_weights_same_bytes(tmp_path: Path, tokenizer_dir: Path) -> None:
    one = write_weights(tmp_path / "one", llama(True), torch.bfloat16)
    two = write_weights(tmp_path / "two", llama(True), torch.bfloat16, shards=4)
    for weights in (one, two):
        export(weights, tmp_path / f"{weights.name}-out", tokenizer_dir=tokenizer_dir, card=CARD)
    sums = [(tmp_path / f"{name}-out" / "SHA256SUMS").read_text() for name in ("one", "two")]
    assert sums[0] == sums[1]


@pytest.mark.usefixtures("no_reload")
def test_dtype_rules(tmp_path: Path, tokenizer_dir: Path) -> None:
    def run(weights: Path) -> Any:
        out = tmp_path / f"{weights.name}-out"
        return export(weights, out, tokenizer_dir=tokenizer_dir, card=CARD, dtype="fp32")

    fp32 = write_weights(tmp_path / "fp32", gpt2())
    assert run(fp32).dtype == "fp32"
    exact = load_file(tmp_path / "fp32-out" / "model.safetensors")
    assert all(torch.equal(exact[k], v) for k, v in load_file(fp32 / "model.safetensors").items())
    with pytest.raises(UserError, match="contains bf16 weights"):
        run(write_weights(tmp_path / "bf16", gpt2(), torch.bfloat16))
    # The complement of a bf16 run kept its rounded values: fp32 would give it away.
    mixed = load_file(fp32 / "model.safetensors")
    frozen = mixed["transformer.wte.weight"][:10]
    frozen.copy_(frozen.bfloat16())
    (tmp_path / "mixed").mkdir()
    save_file(mixed, tmp_path / "mixed" / "model.safetensors")
    (tmp_path / "mixed" / "config.json").write_text((fp32 / "config.json").read_text())
    with pytest.raises(UserError, match=r"a part of .* was once rounded to 16 bits") as caught:
        run(tmp_path / "mixed")
    assert "wte" not in str(caught.value)
    assert not (tmp_path / "mixed-out").exists()


@pytest.mark.usefixtures("no_reload")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_few_rounded_elements_are_refused(
    tmp_path: Path, tokenizer_dir: Path, dtype: torch.dtype
) -> None:
    """A complement of 0.5%, spread over all matrices."""
    weights = write_weights(tmp_path / "few", gpt2())
    tensors = load_file(weights / "model.safetensors")
    for tensor in tensors.values():
        some = tensor.flatten()[::200]
        some.copy_(some.to(dtype))
    save_file(tensors, weights / "model.safetensors")
    with pytest.raises(UserError, match="was once rounded to 16 bits"):
        export(weights, tmp_path / "out", tokenizer_dir=tokenizer_dir, card=CARD, dtype="fp32")


def test_chance_is_not_rounding() -> None:
    """Numbers of torch and of a secret key, of which 2^-13 end in 13 zeros."""
    drawn = torch.empty(1 << 22)
    RandomFill("normal", (0.0, 0.02)).draw(bytes(32), "w", 0, 0, drawn)
    plain = torch.empty(1 << 22).normal_(0.0, 0.02, generator=torch.Generator().manual_seed(0))
    for values in (drawn, plain):
        for bits in (FP16_BITS, BF16_BITS):
            count = Rounded(bits)
            count.add(torch.ones(1000))
            count.add(torch.zeros(1000, 2))
            count.add(values.view(2048, -1))
            assert not count.found
            few = values[: 1 << 12].bfloat16().float()  # 0.1%
            count.add(torch.cat([few, values[1 << 12 :]]).view(2048, -1))
            assert count.found


def spoil_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def spoil_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def spoil_names(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["transformer.ln_f.bias"]
    save_file(tensors, folder / "model.safetensors")


def spoil_values(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.ln_f.bias"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors")


def spoil_shape(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.ln_f.bias"] = torch.zeros(5)
    save_file(tensors, folder / "model.safetensors")


def spoil_dtype(folder: Path) -> None:
    tensors = {k: v.double() for k, v in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")


def spoil_json(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text("{")


@pytest.mark.usefixtures("no_reload")
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_config, "has no config.json"),
        (spoil_weights, "model.safetensors is damaged"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
        (spoil_names, "lacks transformer.ln_f.bias"),
        (spoil_values, "ln_f.bias has NaN or infinity"),
        (spoil_shape, r"has shape \[5\], but config.json requires \[32\]"),
        (spoil_dtype, "contains tensors of F64"),
        (spoil_json, "index.json is damaged"),
    ],
)
def test_unusable_weights(spoil: Any, message: str, tmp_path: Path, tokenizer_dir: Path) -> None:
    weights = write_weights(tmp_path / "weights", gpt2())
    spoil(weights)
    with pytest.raises(UserError, match=message):
        export(weights, tmp_path / "release", tokenizer_dir=tokenizer_dir, card=CARD)
    assert os.listdir(tmp_path) == ["weights"]


def test_mistakes_leave_nothing(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = write_weights(tmp_path / "weights", gpt2())
    out = tmp_path / "release"
    with pytest.raises(UserError, match="has no tokenizer"):
        export(weights, out, tokenizer_dir=tmp_path, card=CARD)

    def fail(*_: Any) -> float:
        raise RuntimeError("logits differ")

    monkeypatch.setattr(export_module, "verify_reload", fail)
    with pytest.raises(RuntimeError, match="logits differ"):
        export(weights, out, tokenizer_dir=tokenizer_dir, card=CARD)
    assert os.listdir(tmp_path) == ["weights"]
    out.mkdir()
    with pytest.raises(UserError, match="release already exists: move it away"):
        export(weights, out, tokenizer_dir=tokenizer_dir, card=CARD)
    assert os.listdir(out) == []


@pytest.mark.processes
def test_a_release_that_computes_something_else_is_refused(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An allow-list without rope_parameters would change every output, and load without an
    error."""

    def forgetful(config: PreTrainedConfig, dtype: str) -> dict[str, Any]:
        kept = release_config(config, dtype)
        del kept["rope_parameters"], kept["rope_theta"]
        return kept

    monkeypatch.setattr(export_module, "release_config", forgetful)
    weights = write_weights(tmp_path / "weights", llama(False))
    with pytest.raises(RuntimeError, match="logits differ by"):
        export(weights, tmp_path / "release", tokenizer_dir=tokenizer_dir, card=CARD, dtype="fp32")
    assert os.listdir(tmp_path) == ["weights"]


def test_paths_in_a_config_are_refused() -> None:
    config = llama(False)
    config.rope_parameters["rope_type"] = "/home/alice/rope"
    with pytest.raises(UserError, match="rope_type is '/home/alice/rope'"):
        release_config(config, "bfloat16")


def test_shard_sizes() -> None:
    assert shard_bytes("5GB") == 5_000_000_000
    assert shard_bytes("20 kb") == 20_000
    assert shard_bytes(123) == 123
    for wrong in ("5", "GB", "0GB", "-1GB", "1.5GB", "5TB"):
        with pytest.raises(UserError, match="is not a size such as"):
            shard_bytes(wrong)


@pytest.mark.parametrize("secrecy", ["secret", "public", "none"])
def test_card_says_what_the_secret_is_worth(secrecy: Any) -> None:
    facts = CardFacts(**{**vars(CARD), "secrecy": secrecy, "val_loss": None, "license": "mit"})
    card = render(facts, {"architectures": ["LlamaForCausalLM"]}, 10, "bf16")
    assert ("Private Mask Pre-Training" in card) == (secrecy != "none")
    assert ("public seed" in card) == (secrecy == "public")
    assert "not measured" in card
    assert 'license: "mit"' in card


def front_of(**metadata: Any) -> dict[str, Any]:
    """The card's front matter, as the hub reads it."""
    facts = CardFacts(**{**vars(CARD), **metadata})
    card = render(facts, {"architectures": ["LlamaForCausalLM"]}, 10, "bf16")
    front: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return front


def test_metadata_of_the_card() -> None:
    assert not front_of().keys() & {"license", "language", "datasets"}
    front = front_of(license="apache-2.0", languages=("en", "de"), datasets=("a/b",))
    assert front["license"] == "apache-2.0"
    assert front["language"] == ["en", "de"]
    assert front["datasets"] == ["a/b"]
    streamed = front_of(dataset_sources=("hf:a/b", "/home/alice/x.jsonl", "hf:plain", "python"))
    assert streamed["datasets"] == ["a/b", "plain"]


@pytest.mark.parametrize(
    ("languages", "datasets", "message"),
    [
        (("English",), (), "--language 'English' is not a code such as en"),
        ((), ("/home/alice/corpus",), "--dataset '/home/alice/corpus' is not a name on the"),
        ((), ("corpus/secret",), "a path would reveal details of this machine"),
        ((), ("../corpus",), "is not a name"),
    ],
)
def test_metadata_that_is_refused(
    languages: Any, datasets: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "corpus/secret").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        check_metadata(languages, datasets)
    check_metadata(("en", "pt-BR", "zho", "code"), ("squad", "DKYoon/SlimPajama-6B"))


def test_card_of_a_derivative() -> None:
    facts = DerivativeFacts(name="tuned", base="tiny", date="2026-02-01")
    card = render(facts, {"architectures": ["LlamaForCausalLM"]}, 10, "bf16")
    assert "fine-tuned from `tiny`" in card
    assert "## Training" not in card


@pytest.mark.processes
def test_padding_of_the_vocabulary_stays_behind(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for tied in (False, True):
        weights = write_weights(tmp_path / f"{tied}", llama(tied), torch.bfloat16)
        out = tmp_path / f"{tied}-out"
        summary = export(weights, out, tokenizer_dir=tokenizer_dir, card=CARD, vocab_size=50)
        assert json.loads((out / "config.json").read_text())["vocab_size"] == 50
        private, released = tensors_of(weights), tensors_of(out)
        cut = {name for name in private if private[name].shape != released[name].shape}
        assert cut == {"model.embed_tokens.weight"} | (set() if tied else {"lm_head.weight"})
        for name, tensor in released.items():
            assert torch.equal(tensor, private[name][: tensor.shape[0]])
        assert summary.logits_difference == 0
        monkeypatch.setattr(export_module, "verify_reload", lambda *_: 0.0)  # once is enough


@pytest.mark.usefixtures("no_reload")
def test_fp16(tmp_path: Path, tokenizer_dir: Path) -> None:
    def run(weights: Path) -> dict[str, torch.Tensor]:
        out = tmp_path / f"{weights.name}-out"
        export(weights, out, tokenizer_dir=tokenizer_dir, card=CARD, dtype="fp16")
        return tensors_of(out)

    for name, dtype in (("fp16", torch.float16), ("fp32", torch.float32)):
        weights = write_weights(tmp_path / name, gpt2(), dtype)
        for key, tensor in run(weights).items():
            assert torch.equal(tensor, tensors_of(weights)[key].half())
    with pytest.raises(UserError, match="contains bf16 weights, and in fp16"):
        run(write_weights(tmp_path / "bf16", gpt2(), torch.bfloat16))
    large = write_weights(tmp_path / "large", gpt2())
    tensors = load_file(large / "model.safetensors")
    tensors["transformer.ln_f.bias"][0] = 1e5
    save_file(tensors, large / "model.safetensors")
    with pytest.raises(UserError, match=r"ln_f.bias has values above 65504: export bf16"):
        run(large)


def layers(count: int) -> LlamaConfig:
    """16 MiB of fp32 weights a layer; the largest parameter has 4."""
    return LlamaConfig(
        vocab_size=64,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=count,
        num_attention_heads=8,
        bos_token_id=None,
        eos_token_id=0,
    )


@pytest.fixture(scope="module")
def middle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return 130 MB of weights in one file."""
    return write_weights(tmp_path_factory.mktemp("middle") / "weights", layers(8))


@pytest.mark.usefixtures("no_reload")
def test_memory_does_not_grow_with_the_model(
    middle: Path, tmp_path: Path, tokenizer_dir: Path
) -> None:
    def extra(weights: Path, out: str) -> int:
        def run() -> None:
            export(weights, tmp_path / out, tokenizer_dir=tokenizer_dir, card=CARD)

        found = peak_extra_bytes(run, torch.device("cpu"))
        assert found is not None
        return found

    small = write_weights(tmp_path / "one-layer", layers(1))
    extra(small, "imports")  # what the first call imports is nobody's
    growth = extra(middle, "middle") - extra(small, "small")
    more = (middle / "model.safetensors").stat().st_size - (
        small / "model.safetensors"
    ).stat().st_size
    assert growth < more / 4, (growth, more)  # a whole copy in bf16 would be half


def test_one_copy_of_the_model_at_a_time(
    middle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the other process runs, this one does not have its 65 MB yet."""
    held: list[int] = []

    def other_process(**_: Any) -> None:
        held.append(psutil.Process().memory_info().rss)
        raise RuntimeError("seen")

    monkeypatch.setattr("pmp_ds.release.verify.run_alone", other_process)
    source = open_source(middle)
    before = psutil.Process().memory_info().rss
    with pytest.raises(RuntimeError, match="seen"):
        verify_reload(source, tmp_path, torch.bfloat16)
    assert held[0] - before < 32 << 20


def test_times_of_files_are_a_day(released: tuple[Path, Path, Any]) -> None:
    assert {path.stat().st_mtime % 86400 for path in released[1].iterdir()} == {0}


@pytest.mark.usefixtures("no_reload")
def test_a_ledger_entry_comes_with_the_release(tmp_path: Path, tokenizer_dir: Path) -> None:
    def run(name: str, dtype: Any, seen: torch.dtype) -> Any:
        weights = tmp_path / name
        if not weights.exists():
            write_weights(weights, gpt2() if name == "one" else llama(True), seen)
        claim = Claim(
            path=tmp_path / "ledger.jsonl",
            lineage="l",
            kind="final",
            updates=1,
            date=CARD.date,
            reason=None,
        )
        out = tmp_path / f"{name}-{dtype}"
        return export(
            weights, out, tokenizer_dir=tokenizer_dir, card=CARD, dtype=dtype, claim=claim
        )

    run("one", "bf16", torch.float32)
    run("one", "fp32", torch.float32)
    short, exact = read(tmp_path / "ledger.jsonl")
    assert short.weights == exact.weights == exact.released != short.released
    with pytest.raises(UserError, match="their difference is the mask"):
        run("two", "bf16", torch.float32)
    assert not (tmp_path / "two-bf16").exists()
    assert len(read(tmp_path / "ledger.jsonl")) == 2


@pytest.mark.usefixtures("no_reload")
def test_an_old_release_again_is_no_second_revision(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ledger compares weights; config.json now says more about the same ones."""
    weights = write_weights(tmp_path / "weights", llama(True), torch.bfloat16)
    claim = Claim(
        path=tmp_path / "ledger.jsonl",
        lineage="l",
        kind="final",
        updates=1,
        date=CARD.date,
        reason=None,
    )

    def config_of(name: str) -> str:
        out = tmp_path / name
        export(weights, out, tokenizer_dir=tokenizer_dir, card=CARD, claim=claim)
        return (out / "config.json").read_text()

    with monkeypatch.context() as before:
        before.setattr("pmp_ds.release.metadata.older_names", lambda *_: {})
        old = config_of("old")
    assert "rope_theta" in json.loads(config_of("new")).keys() - json.loads(old).keys()
    first, second = read(tmp_path / "ledger.jsonl")
    assert (first.weights, first.released) == (second.weights, second.released)


def test_a_signature_needs_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(UserError, match=r"pip install 'pmp_ds\[sign\]'"):
        require_signing(tmp_path / "key.pem")


@pytest.mark.usefixtures("no_reload")
def test_weights_are_read_back(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk keeps something other than what was written."""

    def flip(folder: Path, *_: Any) -> None:
        path = folder / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        seal(folder, *_)

    seal = export_module._write_sums
    monkeypatch.setattr(export_module, "_write_sums", flip)
    weights = write_weights(tmp_path / "weights", gpt2())
    with pytest.raises(UserError, match=r"model.safetensors: does not match SHA256SUMS"):
        export(weights, tmp_path / "release", tokenizer_dir=tokenizer_dir, card=CARD)
    assert not (tmp_path / "release").exists()
