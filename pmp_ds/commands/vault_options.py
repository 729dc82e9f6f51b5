"""The options of `pmp-ds vault`, by verb."""

from dataclasses import dataclass
from pathlib import Path

from pmp_ds.cli import option
from pmp_ds.errors import require


@dataclass(frozen=True, kw_only=True)
class Passphrase:
    """A passphrase instead of a key."""

    passphrase: bool = False
    """Ask for a passphrase."""

    passphrase_file: Path | None = option("FILE", None)
    """Read it from a file's first line; /dev/fd/N reads a descriptor."""

    @property
    def by_passphrase(self) -> bool:
        return self.passphrase or self.passphrase_file is not None


@dataclass(frozen=True, kw_only=True)
class AnyTicket(Passphrase):
    """Of a sealed file."""

    file: Path = option("FILE|FOLDER", positional=True)
    """A sealed file, or a ticket's folder."""

    identity: Path | None = option("KEY", None)
    """The secret key that opens it: age's or ssh's."""


@dataclass(frozen=True, kw_only=True)
class Keygen:
    """Make a secret key; its public key is printed."""

    out: Path = option("FILE")
    """A new file, readable by you alone."""


@dataclass(frozen=True, kw_only=True)
class Seal(Passphrase):
    """Seal a run's ticket for one recipient, with a watermark."""

    run: Path = option("FOLDER")
    """A run's folder, runs/NAME."""

    name: str = option("NAME")
    """The recipient, as trace will name them."""

    to: tuple[str, ...] = option("KEY", ())
    """Public keys, or files with one on each line; any of them opens the file."""

    out: Path = option("FILE")
    """A new file."""

    no_watermark: bool = False
    """Make a copy that cannot be traced, for yourself."""

    def __post_init__(self) -> None:
        require(
            bool(self.to) != self.by_passphrase,
            "give --to KEY, or a passphrase, and not both: age allows either",
        )


@dataclass(frozen=True, kw_only=True)
class Open(AnyTicket):
    """Write the ticket in a sealed file as a folder."""

    out: Path = option("FOLDER")
    """A new folder, yours alone."""


@dataclass(frozen=True, kw_only=True)
class Show(AnyTicket):
    """Show what a ticket keeps of each kind of parameter: as secret as itself."""


@dataclass(frozen=True, kw_only=True)
class Verify(AnyTicket):
    """Say whether a ticket fits a model and comes from a run."""

    model: Path | None = option("FOLDER", None)
    """A release: names and shapes must be equal."""

    run: Path | None = option("FOLDER", None)
    """The owner's run it should come from."""

    def __post_init__(self) -> None:
        require(
            self.model is not None or self.run is not None,
            "verify against what? Give --model FOLDER, --run FOLDER, or both",
        )


@dataclass(frozen=True, kw_only=True)
class List:
    """List the copies of a run's ticket that were sealed."""

    run: Path = option("FOLDER")
    """A run's folder, runs/NAME."""


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Name the recipient whose copy leaked, or nobody."""

    run: Path = option("FOLDER")
    """A run's folder, runs/NAME."""

    ticket: Path | None = option("FOLDER", None)
    """The leaked ticket."""

    model: Path | None = option("FOLDER", None)
    """A model that was fine-tuned with it."""

    base: Path | None = option("FOLDER", None)
    """The model that --model was fine-tuned from. Default: the run's release."""

    def __post_init__(self) -> None:
        require(
            (self.ticket is None) != (self.model is None),
            "trace what? Give --ticket FOLDER or --model FOLDER",
        )
