"""Train sentencepiece models, and make a Hugging Face fast tokenizer with the same ids.

Unlike in the converter of `transformers`, merges use only ordinary pieces: there, `<` and `s>`
merge into the token `<s>` if the vocabulary happens to contain `s>`.
"""

import io
from collections.abc import Iterable, Iterator
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

from pmp_ds.errors import UserError

_SPACE = "\u2581"
_MAX_SENTENCE_BYTES = 4000  # sentencepiece skips sentences above 4192


def parse_model(model: bytes) -> Any:
    """Return the ``ModelProto`` in a `.model` file."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model)
    return proto


def train_model(texts: Iterable[str], vocab_size: int) -> bytes:
    """Train a BPE `.model` with byte fallback, without normalization. Raises UserError."""
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(piece for text in texts for piece in _sentences(text)),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            shuffle_input_sentence=False,
            num_threads=1,  # stored in the model
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(
            f"no tokenizer with train_vocab_size={vocab_size} can be trained on this input: "
            f"{str(error).strip().splitlines()[-1]}; choose another train_vocab_size, add text, "
            "or name a ready tokenizer"
        ) from error
    return model.getvalue()


def _sentences(text: str) -> Iterator[str]:
    """Yield pieces of ``text`` under sentencepiece's limit, cut at line ends where possible."""
    lines: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        for start in range(0, len(line), _MAX_SENTENCE_BYTES // 4):
            part = line[start : start + _MAX_SENTENCE_BYTES // 4]  # at most 4 bytes per character
            num_bytes = len(part.encode("utf-8"))
            if size + num_bytes > _MAX_SENTENCE_BYTES:
                yield "".join(lines)
                lines, size = [], 0
            lines.append(part)
            size += num_bytes
    if lines:
        yield "".join(lines)


def fast_from_sentencepiece(proto: Any) -> Tokenizer:
    """Return the equivalent of a sentencepiece ``ModelProto`` of type BPE or Unigram.

    Without a character map it is equal on all text that the model covers; otherwise it is close,
    and the caller compares. Raises UserError for another model type.
    """
    kinds = type(proto.pieces[0])
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    ordinary = {
        piece.piece: index
        for index, piece in enumerate(proto.pieces)
        if piece.type in (kinds.NORMAL, kinds.USER_DEFINED)
    }
    spec = proto.trainer_spec
    byte_fallback = any(piece.type == kinds.BYTE for piece in proto.pieces)
    if spec.model_type == type(spec).BPE:
        model: Any = models.BPE(
            {piece: index for index, (piece, _) in enumerate(pieces)},
            _merges(pieces, ordinary),
            unk_token=proto.pieces[spec.unk_id].piece,
            fuse_unk=True,
            byte_fallback=byte_fallback,
        )
    elif spec.model_type == type(spec).UNIGRAM:
        model = models.Unigram(pieces, spec.unk_id, byte_fallback)
    else:
        raise UserError(
            "the sentencepiece model is neither BPE nor unigram; choose another tokenizer"
        )
    fast = Tokenizer(model)
    rules = proto.normalizer_spec
    fast.normalizer = _normalizer(rules)
    decoding: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if rules.add_dummy_prefix:
        decoding.append(decoders.Strip(" ", 1, 0))
    fast.decoder = decoders.Sequence(decoding)
    for piece in proto.pieces:
        if piece.type in (kinds.CONTROL, kinds.UNKNOWN):
            fast.add_special_tokens([AddedToken(piece.piece, special=True, normalized=False)])
        elif piece.type == kinds.USER_DEFINED:
            fast.add_tokens([AddedToken(piece.piece, special=False, normalized=True)])
    return fast


def _merges(pieces: list[tuple[str, float]], ordinary: dict[str, int]) -> list[tuple[str, str]]:
    """Return every way to make an ordinary piece from two, best score first."""
    merges: list[tuple[str, str]] = []
    for piece, _ in sorted(ordinary.items(), key=lambda item: (-pieces[item[1]][1], item[1])):
        pairs = [
            (piece[:cut], piece[cut:])
            for cut in range(1, len(piece))
            if piece[:cut] in ordinary and piece[cut:] in ordinary
        ]
        if len(pairs) > 1:
            pairs.sort(key=lambda pair: (ordinary[pair[0]], ordinary[pair[1]]))
        merges += pairs
    return merges


def _normalizer(rules: Any) -> Any:
    steps: list[Any] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    steps.append(normalizers.Replace(" ", _SPACE))
    return normalizers.Sequence(steps)
