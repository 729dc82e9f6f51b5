"""A requested preparation: the settings, the input files and the tokenizer."""

import contextlib
import dataclasses
import hashlib
import json
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from pmp_ds.data.manifest import FORMAT_VERSION
from pmp_ds.prepare.config import PrepareConfig
from pmp_ds.prepare.corpus import Source, StreamOptions
from pmp_ds.prepare.inputs import find_sources
from pmp_ds.prepare.tokenizer import Tokenizer, load_tokenizer

_LIBRARIES = ("gigatoken", "pyarrow", "sentencepiece", "tokenizers")


@dataclass(frozen=True, kw_only=True)
class Request:
    """A preparation, as far as it is known before text is read."""

    config: PrepareConfig
    sources: list[Source]

    tokenizer: Tokenizer | None
    """None: to be trained on the sources."""

    settings: dict[str, Any]
    """The settings that determine the content of the store."""

    left_out: tuple[str, ...]
    """One line on each kind of file that the inputs contain and that is not read."""

    @classmethod
    def of(cls, config: PrepareConfig) -> "Request":
        """Find the sources and load the tokenizer. Raises UserError when one cannot be used."""
        stream = StreamOptions(
            split=config.hf_split,
            config=config.hf_config,
            revision=config.hf_revision,
            shuffle_buffer=config.shuffle_buffer,
            seed=config.shuffle_seed,
        )
        notes: list[str] = []
        sources = find_sources(config.input, stream, notes)
        tokenizer = None if config.tokenizer is None else load_tokenizer(config.tokenizer)
        inputs = []
        for given in config.input:
            files = [(s.name, s.num_bytes) for s in sources if s.given == given]
            entry = {"input": given, "files": len(files), "names_and_sizes": _digest(files)}
            inputs.append(entry)
        trained = f"trained here with train_vocab_size={config.train_vocab_size}"
        settings = {
            "input": inputs,
            "text_field": config.text_field,
            "tokenizer": trained if tokenizer is None else tokenizer.fingerprint,
            "block_size": config.block_size,
            "bos": config.bos,
            "val_fraction": config.val_fraction,
        }
        if any(source.kind == "stream" for source in sources):
            settings = {"stream": dataclasses.asdict(stream)} | settings
        return cls(
            config=config,
            sources=sources,
            tokenizer=tokenizer,
            settings=settings,
            left_out=tuple(notes),
        )

    @property
    def out(self) -> Path:
        return Path(self.config.out)

    @property
    def stream(self) -> Source | None:
        """The first source that is a stream, or None."""
        return next((source for source in self.sources if source.kind == "stream"), None)

    @property
    def identity(self) -> dict[str, Any]:
        """The values that must not change for finished parts of a killed run to be reused, as JSON
        returns them."""
        versions = {}
        for name in _LIBRARIES:
            with contextlib.suppress(metadata.PackageNotFoundError):
                versions[name] = metadata.version(name)
        identity = {
            "engine": self.config.engine,
            "format_version": FORMAT_VERSION,
            "inputs": _digest([(s.name, s.num_bytes, s.version) for s in self.sources]),
            "settings": self.settings,
            "versions": versions,
        }
        found: dict[str, Any] = json.loads(json.dumps(identity))
        return found


def _digest(files: list[Any]) -> str:
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()
