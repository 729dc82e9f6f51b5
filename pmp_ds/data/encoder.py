"""Text to ids in any process: the reference library, and a faster engine with the same ids.

An ``EncoderSpec`` comes from a ``Tokenizer``, passes ``choose_engine`` once, and is sent to every
worker, which makes an ``Encoder`` of it. Imports neither torch nor transformers.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pmp_ds.errors import UserError

Ids = npt.NDArray[np.integer]

_FAST = "gigatoken"
_SPOT_CHARS = 4000
_EDGES = (
    "a", " ", "\n", "  two  spaces\n\n\n\tand a tab ", "\r\n\r\n x\u00a0y\u3000z\u200b\u2028",
    "don't WE'LL 'tis 1234567.89 ___ --- ((( ==", "\u00e9 e\u0301 \u4e2d\u6587 \u0661\u00b2\u00bd",
    "\U0001f600\u200d\U0001f525 \x00\x01 \u2581 \u2581\u2581x \ufeff \ufffd",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """All that the ids of a text depend on, as bytes."""

    library: Literal["tokenizers", "sentencepiece"]
    """The reference: its ids are the right ones."""

    model: bytes
    """Its model: a tokenizer.json that recognises no special token, or a serialized .model."""

    fast: str | None
    """A tokenizer.json for the fast engine; None: the reference encodes everything."""

    marked: tuple[str, ...]
    """Special and added tokens as spelled in text; a text with one goes to the reference."""

    @property
    def engine(self) -> str:
        """Name and version of what encodes, for the manifest."""
        name = self.library if self.fast is None else _FAST
        return f"{name} {metadata.version(name)}"


class Encoder:
    """Encodes as the spec's reference does, with the engine that the spec names."""

    def __init__(self, spec: EncoderSpec) -> None:
        self.spec = spec
        self._model = _load_reference(spec)
        self._fast = None if spec.fast is None else _load_fast(spec.fast)
        self._openings = {name[:2] for name in spec.marked}

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """The ids ``(tokens,)`` of every text, none of them special.

        The start of one text of every batch is encoded by the reference too. Raises UserError when
        the ids differ.
        """
        if self._fast is None:
            return self.reference(texts)
        out: list[Ids] = [np.empty(0, np.uint32)] * len(texts)
        marked = [i for i, text in enumerate(texts) if self._is_marked(text)]
        for i, ids in zip(marked, self.reference([texts[i] for i in marked]), strict=True):
            out[i] = ids
        left_out = set(marked)
        plain = [i for i in range(len(texts)) if i not in left_out]
        for i, ids in zip(plain, self._encode_fast([texts[i] for i in plain]), strict=True):
            out[i] = ids
        if plain:
            self._spot_check(texts[plain[0]][:_SPOT_CHARS])
        return out

    def reference(self, texts: Sequence[str]) -> list[Ids]:
        """What ``encode_batch`` gives, slowly."""
        if not texts:
            return []
        if self.spec.library == "sentencepiece":
            return list(self._model.encode(list(texts), return_type="numpy"))
        encodings = self._model.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def count_differences(self, texts: Sequence[str]) -> int:
        """How many of the texts the fast engine encodes otherwise than the reference."""
        texts = [text for text in texts if not self._is_marked(text)]
        pairs = zip(self._encode_fast(texts), self.reference(texts), strict=True)
        return sum(not np.array_equal(found, expected) for found, expected in pairs)

    def _encode_fast(self, texts: Sequence[str]) -> list[Ids]:
        if not texts:
            return []
        assert self._fast is not None
        layout = self._fast.encode_batch(list(texts), parallel=False).layout
        ids, ends = layout.content.data, layout.offsets.data
        return [ids[ends[i] : ends[i + 1]] for i in range(len(texts))]

    def _is_marked(self, text: str) -> bool:
        if not any(opening in text for opening in self._openings):
            return False
        return any(name in text for name in self.spec.marked)

    def _spot_check(self, text: str) -> None:
        if self.count_differences([text]):
            raise UserError(
                f"{self.spec.engine} gives other ids than {self.spec.library} on the document that "
                f"starts with {text[:60]!r}, although they agreed on the sample: set "
                "engine: reference"
            )


def choose_engine(spec: EncoderSpec, sample: Sequence[str]) -> tuple[EncoderSpec, str | None]:
    """The spec with the fast engine if that is installed, reads this tokenizer and gives the
    reference's ids on ``sample``; else without, and the warning to show.
    """
    slow = dataclasses.replace(spec, fast=None)
    if spec.fast is None:
        return slow, None
    try:
        encoder = Encoder(spec)
        differences = encoder.count_differences([*_EDGES, *sample])
    except ImportError as error:
        return slow, f"encoding with {slow.engine}, which is slower: {_FAST} is missing ({error})"
    except BaseException as error:
        # A panic of the engine is a BaseException of its own.
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        why = f"{_FAST} does not read this tokenizer ({reason})"
        return slow, f"encoding with {slow.engine}, which is slower: {why}"
    if differences:
        return slow, (
            f"encoding with {slow.engine}, which is slower: {_FAST} gives other ids on "
            f"{differences} of {len(sample) + len(_EDGES)} sampled texts"
        )
    return spec, None


def _load_reference(spec: EncoderSpec) -> Any:
    if spec.library == "sentencepiece":
        import sentencepiece

        return sentencepiece.SentencePieceProcessor(model_proto=spec.model)
    from tokenizers import Tokenizer

    return Tokenizer.from_str(spec.model.decode())


def _load_fast(description: str) -> Any:
    import gigatoken

    return gigatoken.Tokenizer.from_json(description).backend
