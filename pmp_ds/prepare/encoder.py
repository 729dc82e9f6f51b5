"""Encode text in any process, with the reference library or a faster engine with the same ids.

An ``Encoder`` comes from a ``Tokenizer`` and passes ``choose_engine`` once; worker processes
receive its ``EncoderSpec``. Imports neither torch nor transformers.
"""

import dataclasses
import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pmp_ds.errors import UserError

Ids = npt.NDArray[np.integer]

_FAST = "gigatoken"
_SPOT_BYTES = 4000
_EDGES = (
    "a",
    " ",
    "\n",
    "  two  spaces\n\n\n\tand a tab ",
    "\r\n\r\n x\u00a0y\u3000z\u200b\u2028",
    "don't WE'LL 'tis 1234567.89 ___ --- ((( ==",
    "\u00e9 e\u0301 \u4e2d\u6587 \u0661\u00b2\u00bd",
    "\U0001f600\u200d\U0001f525 \x00\x01 \u2581 \u2581\u2581x \ufeff \ufffd",
)


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """Everything that determines the ids of a text, as bytes."""

    library: Literal["tokenizers", "sentencepiece"]
    """The reference library, whose ids are correct by definition."""

    model: bytes
    """Its model: a tokenizer.json that recognises no special token, or a serialized .model."""

    fast: str | None
    """A tokenizer.json for the fast engine; None: the reference encodes everything."""

    marked: tuple[str, ...]
    """Special and added tokens as spelled in text; the reference encodes texts that contain one."""

    @property
    def engine(self) -> str:
        """Name and version of the encoding library, for the manifest."""
        name = self.library if self.fast is None else _FAST
        return f"{name} {metadata.version(name)}"


class Encoder:
    """Encodes as the spec's reference does, with the engine named by the spec.

    Threads may share an encoder, but then take turns; ``twin`` makes one per thread. Both libraries
    are loaded when first needed.
    """

    def __init__(self, spec: EncoderSpec, reference: "_Lazy | None" = None) -> None:
        """Share ``reference``, if given, with an encoder of the same model."""
        self.spec = spec
        self._reference = reference or _Lazy(lambda: _load_reference(spec))
        self._fast = _Lazy(lambda: _load_fast(spec.fast))
        self._turns = threading.Lock()
        self._marked = [name.encode("utf-8") for name in spec.marked]
        self._openings = {name[:1] for name in self._marked}

    def __reduce__(self) -> tuple[Any, ...]:
        return Encoder, (self.spec,)

    def twin(self) -> "Encoder":
        """Return an encoder for another thread, with its own engine and the shared reference."""
        return Encoder(self.spec, self._reference)

    def without_fast(self) -> "Encoder":
        """Return an encoder that uses the reference alone."""
        return Encoder(dataclasses.replace(self.spec, fast=None), self._reference)

    def encode_batch(
        self,
        documents: Sequence[bytes],  # UTF-8, which the engine does not check
    ) -> list[Ids]:
        """Return the ids ``(tokens,)`` of every document, none of them special.

        The start of one document per batch is also encoded by the reference. Raises UserError when
        the ids differ.
        """
        if self.spec.fast is None:
            return self.reference([document.decode("utf-8") for document in documents])
        out: list[Ids] = [np.empty(0, np.uint32)] * len(documents)
        marked = [i for i, document in enumerate(documents) if self._is_marked(document)]
        texts = [documents[i].decode("utf-8") for i in marked]
        for i, ids in zip(marked, self.reference(texts), strict=True):
            out[i] = ids
        left_out = set(marked)
        plain = [i for i in range(len(documents)) if i not in left_out]
        for i, ids in zip(plain, self._encode_fast([documents[i] for i in plain]), strict=True):
            out[i] = ids
        if plain:
            self._spot_check(documents[plain[0]][:_SPOT_BYTES].decode("utf-8", "ignore"))
        return out

    def reference(self, texts: Sequence[str]) -> list[Ids]:
        """Return what ``encode_batch`` would, slowly."""
        if not texts:
            return []
        if self.spec.library == "sentencepiece":
            return list(self._reference.get().encode(list(texts), return_type="numpy"))
        encodings = self._reference.get().encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def count_differences(self, texts: Sequence[str]) -> int:
        """Return how many texts the fast engine and the reference encode differently."""
        documents = [text.encode("utf-8") for text in texts]
        plain = [i for i, document in enumerate(documents) if not self._is_marked(document)]
        found = self._encode_fast([documents[i] for i in plain])
        pairs = zip(found, self.reference([texts[i] for i in plain]), strict=True)
        return sum(not np.array_equal(found, expected) for found, expected in pairs)

    def _encode_fast(self, documents: list[bytes]) -> list[Ids]:
        if not documents:
            return []
        with self._turns:
            layout = self._fast.get().encode_batch(documents, parallel=False).layout
        ids, ends = layout.content.data, layout.offsets.data.tolist()
        return [ids[start:end] for start, end in itertools.pairwise(ends)]

    def _is_marked(self, document: bytes) -> bool:
        if not any(opening in document for opening in self._openings):
            return False
        return any(name in document for name in self._marked)

    def _spot_check(self, text: str) -> None:
        if self.count_differences([text]):
            raise UserError(
                f"{self.spec.engine} gives other ids than {self.spec.library} for the document "
                f"that starts with {text[:60]!r}, although they agreed on the sample: set "
                "engine: reference"
            )


class _Lazy:
    """A value that the first thread to need it loads for all."""

    def __init__(self, load: Callable[[], Any]) -> None:
        self._load, self._loading = load, threading.Lock()
        self._loaded: Any = None

    def get(self) -> Any:
        with self._loading:
            if self._loaded is None:
                self._loaded = self._load()
            return self._loaded


def choose_engine(encoder: Encoder, sample: Sequence[str]) -> tuple[Encoder, str | None]:
    """Return the encoder if its fast engine is installed, reads this tokenizer and gives the
    reference's ids on ``sample``; otherwise one without it, and the warning to show.
    """
    if encoder.spec.fast is None:
        return encoder, None
    slow = encoder.without_fast()
    name = slow.spec.engine
    try:
        differences = encoder.count_differences([*_EDGES, *sample])
    except ImportError as error:
        return slow, f"encoding with {name}, which is slower: {_FAST} is missing ({error})"
    except BaseException as error:
        # A panic of the engine is a BaseException, not an Exception.
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        why = f"{_FAST} cannot read this tokenizer ({reason})"
        return slow, f"encoding with {name}, which is slower: {why}"
    if differences:
        return slow, (
            f"encoding with {name}, which is slower: {_FAST} gives other ids on "
            f"{differences} of {len(sample) + len(_EDGES)} sampled texts"
        )
    return encoder, None


def _load_reference(spec: EncoderSpec) -> Any:
    if spec.library == "sentencepiece":
        import sentencepiece

        return sentencepiece.SentencePieceProcessor(model_proto=spec.model)
    from tokenizers import Tokenizer

    return Tokenizer.from_str(spec.model.decode())


def _load_fast(description: str | None) -> Any:
    import gigatoken

    assert description is not None
    return gigatoken.Tokenizer.from_json(description).backend
