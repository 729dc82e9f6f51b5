"""Text to ids: a Hugging Face tokenizer, a sentencepiece model, or one trained on the corpus.

All kinds encode a special token spelled in text (`</s>`) as text, so a document cannot forge a
document boundary. ``save_pretrained`` writes a folder that a plain ``AutoTokenizer`` reads.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from pmp_ds.errors import UserError, require
from pmp_ds.foreign import read_bytes
from pmp_ds.prepare import fast_tokenizer
from pmp_ds.prepare.encoder import Encoder, EncoderSpec, Ids
from pmp_ds.prepare.spm import fast_from_sentencepiece, parse_model, train_model

MODEL_FILE = "tokenizer.model"
_MOST_BYTES = 1 << 28  # in a sentencepiece model; one of 250,000 pieces has 5 MB


class Tokenizer(Protocol):
    """The interface of all tokenizer kinds."""

    kind: str
    """`huggingface`, `sentencepiece` or `trained`."""

    vocab_size: int
    """One more than the largest id."""

    eos_id: int
    bos_id: int | None
    special_tokens: dict[str, int]
    """Every special token, as spelled in text, and its id."""

    fingerprint: str
    """sha256 of everything that determines the ids."""

    encoder: Encoder
    """Encodes as this tokenizer does, and possibly faster after ``choose_engine``."""

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """Return the ids ``(tokens,)`` of every text; special ones are not added or recognised."""
        ...

    def save_pretrained(self, folder: Path) -> None:
        """Write a folder for ``AutoTokenizer``, and the sentencepiece model if there is one."""
        ...


def load_tokenizer(path: str) -> Tokenizer:
    """Load a Hugging Face folder, a tokenizer.json, or a sentencepiece ``.model`` file.

    Raises UserError when it is unreadable, not a fast tokenizer, or has no end-of-text token.
    """
    where = Path(path)
    if not where.exists():
        raise UserError(
            f"tokenizer {path} does not exist; name a Hugging Face tokenizer folder or a "
            "sentencepiece .model file, or leave it unset to train one on the input"
        )
    if where.suffix == ".model":
        return SentencePieceTokenizer(read_bytes(where, _MOST_BYTES), path)
    return HuggingFaceTokenizer(fast_tokenizer.load(where), path)


class HuggingFaceTokenizer:
    """A fast tokenizer of `transformers`, from a folder or from training."""

    kind = "huggingface"

    def __init__(self, tokenizer: Any, name: str, model: bytes | None = None) -> None:
        """Keep ``model``, the sentencepiece model it was converted from, to save it too."""
        self._tokenizer, self._model = tokenizer, model
        if tokenizer.eos_token_id is None:
            raise UserError(_no_eos(name))
        self.eos_id: int = tokenizer.eos_token_id
        self.bos_id: int | None = tokenizer.bos_token_id
        description = json.loads(tokenizer.backend_tokenizer.to_str())
        _require_deterministic(description["model"], tokenizer, name)
        ids: dict[str, int] = tokenizer.get_vocab()
        self.vocab_size = max(ids.values()) + 1
        added = description["added_tokens"]
        names = {token["content"] for token in added if token["special"]}
        names.update(tokenizer.all_special_tokens)
        self.special_tokens = {token: ids[token] for token in sorted(names) if token in ids}
        decisive = ("normalizer", "pre_tokenizer", "model")
        self.fingerprint = _fingerprint(
            {
                **{key: description[key] for key in decisive},
                "added": sorted((token["id"], token["content"]) for token in added),
                "special": self.special_tokens,
                "eos": self.eos_id,
            }
        )
        description.update(truncation=None, padding=None, post_processor=None)
        plain = json.dumps(fast_tokenizer.without_special(description, self.special_tokens))
        self.encoder = Encoder(
            EncoderSpec(
                library="tokenizers",
                model=plain.encode("utf-8"),
                fast=plain,
                marked=_marked([*self.special_tokens, *(token["content"] for token in added)]),
            )
        )

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        return self.encoder.reference(texts)

    def save_pretrained(self, folder: Path) -> None:
        fast_tokenizer.save(self._tokenizer, folder)
        if self._model is not None:
            (folder / MODEL_FILE).write_bytes(self._model)


class TrainedTokenizer(HuggingFaceTokenizer):
    """A tokenizer trained with sentencepiece, used through its exact Hugging Face equivalent."""

    kind = "trained"


class SentencePieceTokenizer:
    """A given sentencepiece model, encoded by sentencepiece itself."""

    kind = "sentencepiece"

    def __init__(self, model: bytes, name: str) -> None:
        import sentencepiece

        try:
            proto = parse_model(model)
            require(len(proto.pieces) > 0, "it has no pieces")
            sentencepiece.SentencePieceProcessor(model_proto=model)
        except Exception as error:  # protobuf and sentencepiece have no common exception
            raise UserError(f"tokenizer {name} is not a sentencepiece model: {error}") from error
        control, spec = type(proto.pieces[0]).CONTROL, proto.trainer_spec
        for index, piece in ((spec.bos_id, spec.bos_piece), (spec.eos_id, spec.eos_piece)):
            # With `user_defined_symbols=</s>` sentencepiece finds it in text: undo that.
            if 0 <= index < len(proto.pieces) and proto.pieces[index].piece == piece:
                proto.pieces[index].type = control
        plain = proto.SerializeToString()
        processor = sentencepiece.SentencePieceProcessor(model_proto=plain)
        self.eos_id = processor.eos_id()
        if self.eos_id < 0:
            raise UserError(_no_eos(name))
        self.bos_id = processor.bos_id() if processor.bos_id() >= 0 else None
        self._model = model
        self.vocab_size = processor.vocab_size()
        self.fingerprint = _fingerprint({"sha256": hashlib.sha256(model).hexdigest()})
        self._proto = proto
        self.special_tokens = {
            piece.piece: index
            for index, piece in enumerate(proto.pieces)
            if piece.type in (control, type(piece).UNKNOWN)
        }
        added = (p.piece for p in proto.pieces if p.type == type(p).USER_DEFINED)
        bpe = proto.trainer_spec.model_type == type(proto.trainer_spec).BPE
        self._converted = fast_from_sentencepiece(proto)
        self.encoder = Encoder(
            EncoderSpec(
                library="sentencepiece",
                model=plain,
                fast=self._converted.to_str() if bpe else None,
                marked=_marked([*self.special_tokens, *added]),
            )
        )

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        return self.encoder.reference(texts)

    def save_pretrained(self, folder: Path) -> None:
        fast_tokenizer.save(fast_tokenizer.wrap(self._converted, self._proto), folder)
        (folder / MODEL_FILE).write_bytes(self._model)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> TrainedTokenizer:
    """Train a BPE tokenizer with byte fallback; equal texts give equal tokenizers.

    It loses only U+2581, which sentencepiece cannot tell from a space. Raises UserError when there
    is too little text, or too many kinds of characters, for ``vocab_size``.
    """
    model = train_model(texts, vocab_size)
    proto = parse_model(model)
    wrapped = fast_tokenizer.wrap(fast_from_sentencepiece(proto), proto)
    return TrainedTokenizer(wrapped, "trained on the input", model)


def load_trained(folder: Path) -> TrainedTokenizer:
    """Load the trained tokenizer that ``save_pretrained`` wrote to ``folder``."""
    model = read_bytes(folder / MODEL_FILE, _MOST_BYTES)
    return TrainedTokenizer(fast_tokenizer.load(folder), str(folder), model)


def _require_deterministic(model: dict[str, Any], tokenizer: Any, name: str) -> None:
    """Raise UserError for a tokenizer that splits text at random."""
    settings = getattr(tokenizer, "init_kwargs", {}).get("sp_model_kwargs") or {}
    drawn = {key: model.get(key) for key in ("dropout", "alpha", "nbest_size")}
    drawn |= {key: settings.get(key) for key in ("enable_sampling",)}
    for key, value in drawn.items():
        if value:
            file = "tokenizer_config.json" if key in settings else "tokenizer.json"
            raise UserError(
                f"tokenizer {name} has {key}={value}: it splits a text differently every time; "
                f"remove {key} from its {file}"
            )


def _marked(names: Iterable[str]) -> tuple[str, ...]:
    """Drop added tokens that are runs of spaces, because they occur everywhere."""
    return tuple(sorted({name for name in names if name.strip()}))


def _fingerprint(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _no_eos(name: str) -> str:
    return (
        f"tokenizer {name} has no end-of-text token, which separates the documents; set eos_token "
        "in its tokenizer_config.json, or choose another tokenizer"
    )
