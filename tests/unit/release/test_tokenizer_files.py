"""The special tokens in a release's tokenizer, config.json and generation_config.json agree."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    GPT2Tokenizer,
    pipeline,
)

from pmp_ds.prepare.saved_tokenizer import save_tokenizer
from pmp_ds.prepare.tokenizer import train_tokenizer
from pmp_ds.release.export import export
from pmp_ds.release.tokenizer_files import settle_tokenizer
from tests.unit.release.conftest import CARD, gpt2, llama, write_weights

TOKENS = {"bos": 0, "eos": 0}


def settings_of(folder: Path, file: str = "tokenizer_config.json") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / file).read_text())
    return found


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Return a byte-level tokenizer like GPT-2's, with only its end of text declared."""
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(["a few words"], 300, special_tokens=["<|endoftext|>", "<s>"])
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    trained.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def change(folder: Path, **values: Any) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(settings_of(folder) | values))


@pytest.mark.usefixtures("no_reload")
@pytest.mark.parametrize("config", [llama(False), gpt2()], ids=["llama", "gpt2"])
def test_three_files_say_the_same(config: Any, tmp_path: Path, tokenizer_dir: Path) -> None:
    weights = write_weights(tmp_path / "weights", config)
    out = tmp_path / "release"
    export(weights, out, tokenizer_dir=tokenizer_dir, card=CARD, leading_bos=False)
    tokenizer = AutoTokenizer.from_pretrained(out)
    generation, settings = settings_of(out, "generation_config.json"), settings_of(out)
    named = settings_of(out, "config.json")
    for role in ("bos", "eos", "pad"):
        assert generation[f"{role}_token_id"] == getattr(tokenizer, f"{role}_token_id") == 0
    assert named["bos_token_id"] == named["eos_token_id"] == 0
    assert named["pad_token_id"] is None  # its embedding would not learn
    assert settings["unk_token"] == "?"
    assert settings["add_bos_token"] is False
    given = tokenizer(["abc", "abcdef"], padding=True)
    assert given.keys() == {"input_ids", "attention_mask"}
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)  # Trainer's
    assert collate([tokenizer("abc"), tokenizer("abcdef")])["input_ids"].shape == (2, 6)
    generate = pipeline("text-generation", model=str(out))
    assert len(generate(["abc", "abcdef"], batch_size=2, max_new_tokens=1)) == 2
    longest = named.get("max_position_embeddings", named.get("n_positions"))
    assert len(tokenizer("a" * 500, truncation=True)["input_ids"]) == longest


def test_what_is_declared_stays(saved: Path) -> None:
    change(saved, pad_token={"content": "<s>"}, unk_token="<s>")
    assert settle_tokenizer(saved, TOKENS, leading_bos=False, context=64) == 1
    assert settings_of(saved)["unk_token"] == "<s>"
    assert settings_of(saved)["model_max_length"] == 64


def test_nothing_but_an_end_of_text(saved: Path) -> None:
    """As in GPT-2's own: CTranslate2 needs all of them. A padding id beyond the vocabulary does
    not count."""
    change(saved, pad_token="[PAD]", model_max_length=int(1e30))
    assert settle_tokenizer(saved, TOKENS, leading_bos=False, context=None) == 0
    settings = settings_of(saved)
    for role in ("bos", "eos", "unk", "pad"):
        assert settings[f"{role}_token"] == "<|endoftext|>"
    assert "model_max_length" not in settings


def test_begin_of_text_of_a_trained_tokenizer(tmp_path: Path) -> None:
    """`<s>` is declared where a document begins with it, and nowhere else."""
    tokenizer = train_tokenizer(["a few words, and some more of them"] * 50, 300)
    for bos, token, leading in (("none", "</s>", False), ("document", "<s>", True)):
        folder = tmp_path / bos
        folder.mkdir()
        save_tokenizer(tokenizer, folder, bos)
        before = (folder / "tokenizer.json").read_bytes()
        tokens = {"bos": 1 if leading else 2, "eos": 2}
        settle_tokenizer(folder, tokens, leading_bos=leading, context=64)
        assert settings_of(folder)["bos_token"] == token
        assert settings_of(folder)["add_bos_token"] is leading
        assert (folder / "tokenizer.json").read_bytes() == before
        assert (AutoTokenizer.from_pretrained(folder).encode("few")[0] == 1) is leading


@pytest.mark.parametrize("leading", [True, False, None])
def test_texts_begin_as_they_were_packed(saved: Path, leading: bool | None) -> None:
    """This holds whatever the user's own tokenizer did; transformers 4 reads only
    tokenizer.json."""
    path = saved / "tokenizer.json"
    fast = Tokenizer.from_file(str(path))
    plain = fast.encode("few", add_special_tokens=False).ids
    fast.post_processor = TemplateProcessing(
        single="<s> $A <s>", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    fast.save(str(path))
    settle_tokenizer(saved, {"bos": 1, "eos": 0}, leading_bos=leading, context=64)
    wanted = {True: [1, *plain], False: plain, None: [1, *plain, 1]}[leading]
    assert Tokenizer.from_file(str(path)).encode("few").ids == wanted
    assert AutoTokenizer.from_pretrained(saved).encode("few") == wanted
    assert ("add_bos_token" in settings_of(saved)) is (leading is not None)


def test_keys_that_transformers_4_cannot_read(saved: Path) -> None:
    """It wants a dictionary of extra_special_tokens, and believes special_tokens_map.json."""
    change(saved, extra_special_tokens=["<s>"])
    (saved / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>"}))
    settle_tokenizer(saved, TOKENS, leading_bos=False, context=64)
    settings = settings_of(saved)
    assert "extra_special_tokens" not in settings
    assert settings["additional_special_tokens"] == ["<s>"]
    assert AutoTokenizer.from_pretrained(saved).extra_special_tokens == ["<s>"]
    assert settings_of(saved, "special_tokens_map.json")["bos_token"] == "<|endoftext|>"


def test_a_tokenizer_of_gpt2(tmp_path: Path) -> None:
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(["a few words"], 300)
    trained.save_model(str(tmp_path))
    files = [str(tmp_path / name) for name in ("vocab.json", "merges.txt")]
    GPT2Tokenizer(*files).save_pretrained(tmp_path)
    end = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).token_to_id("<|endoftext|>")
    before = (tmp_path / "tokenizer.json").read_bytes()
    tokens = {"bos": end, "eos": end}
    assert settle_tokenizer(tmp_path, tokens, leading_bos=False, context=64) == end
    assert settings_of(tmp_path)["bos_token"] == settings_of(tmp_path)["unk_token"]
    assert (tmp_path / "tokenizer.json").read_bytes() == before
