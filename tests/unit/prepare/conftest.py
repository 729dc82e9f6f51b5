"""Text of a few kilobytes, and one tokenizer of every kind that it trains."""

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from pmp_ds.prepare.tokenizer import TrainedTokenizer, train_tokenizer

TEXT = "the tree of a river and stone keeps its own time while rain falls on every leaf"
WORDS = TEXT.split()
SPECIAL = {
    "unk_token": "<unk>",
    "bos_token": "<s>",
    "pad_token": "<pad>",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "<mask>",
}


def make_texts(count: int) -> list[str]:
    """Different documents with words, indentation, numbers and line ends."""
    return [
        "\n".join(
            "    " * ((i + line) % 4)
            + " ".join(WORDS[(i * 7 + line * 3 + w * (1 + i % 5)) % len(WORDS)] for w in range(9))
            + f" = {i * line}"
            for line in range(12)
        )
        for i in range(count)
    ]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return make_texts(200)


@pytest.fixture(scope="session")
def trained(texts: list[str]) -> TrainedTokenizer:
    return train_tokenizer(texts, 400)


@pytest.fixture(scope="session")
def tokenizer_paths(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> dict[str, Path]:
    """Kind of tokenizer to the path that ``load_tokenizer`` takes."""
    root = tmp_path_factory.mktemp("tokenizers")
    paths = dict(_huggingface(root, texts))
    for model_type, options in (
        ("bpe", {"add_dummy_prefix": True}),
        ("unigram", {}),
        # Makes sentencepiece itself find `</s>` in text.
        ("bpe", {"user_defined_symbols": ["</s>", "<|mine|>"]}),
    ):
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type=model_type,
            vocab_size=360,
            byte_fallback=True,
            hard_vocab_limit=False,
            minloglevel=2,
            **options,
        )
        name = "-".join(["sentencepiece", model_type, *options])
        paths[name] = root / f"{name}.model"
        paths[name].write_bytes(model.getvalue())
    return paths


def _huggingface(root: Path, texts: list[str]) -> Iterator[tuple[str, Path]]:
    bytes_bpe = Tokenizer(models.BPE())
    bytes_bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<pad>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    bytes_bpe.train_from_iterator(texts, trainer)
    yield "byte-bpe", _save(bytes_bpe, root / "byte-bpe", "<|endoftext|>", pad_token="<pad>")

    # Every special token there is, and a BOS before every text by default, as Llama 3 has it.
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[*SPECIAL.values(), "</s>", "<|extra|>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    bytes_bos = Tokenizer(models.BPE())
    bytes_bos.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_bos.decoder = decoders.ByteLevel()
    bytes_bos.train_from_iterator(texts, trainer)
    bytes_bos.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    yield "byte-bpe-bos", _save(bytes_bos, root / "byte-bpe-bos", "</s>", **SPECIAL)

    # An EOS that the file does not call special: `encode_special_tokens` overlooks it.
    unspecial = Tokenizer.from_str(bytes_bpe.to_str())
    unspecial.add_tokens([AddedToken("<|stop|>", special=False)])
    yield "unspecial-eos", _save(unspecial, root / "unspecial-eos", "<|stop|>")

    # Unigram and WordLevel keep `</s>` in the vocabulary that text is matched against.
    unigram = Tokenizer(
        models.Unigram(
            [
                ("<unk>", 0.0),
                ("</s>", 0.0),
                *((c, -5.0) for c in sorted(set("".join(texts)))),
                *((c, -5.0) for c in "</>"),
                *((word, -2.0) for word in WORDS if len(word) > 1),
            ],
            unk_id=0,
        )
    )
    yield "unigram", _save(unigram, root / "unigram", "</s>", unk_token="<unk>")

    words = {word: i for i, word in enumerate(["<unk>", "</s>", "\n", *dict.fromkeys(WORDS)])}
    word_level = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    word_level.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    yield "word-level", _save(word_level, root / "word-level", "</s>", unk_token="<unk>")


def _save(tokenizer: Tokenizer, folder: Path, eos: str, **names: str) -> Path:
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, **names).save_pretrained(
        str(folder)
    )
    return folder
