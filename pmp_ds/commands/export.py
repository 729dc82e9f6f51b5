"""Turn a run into a mask-free Hugging Face folder.

    pmp-ds export --run runs/demo
    pmp-ds export --run runs/demo --prompt "def main("
    pmp-ds export --run runs/demo --checkpoint 500 --private --out /tmp/step-500
    pmp-ds export --check runs/demo/release
    pmp-ds export --derivative tuned --base runs/demo/release \\
        --ticket runs/demo/private/ticket --store tokenized_data/demo --out tuned-release

The folder holds dense weights, config, tokenizer, model card and SHA256SUMS, and nothing that
names the ticket. It has been loaded in a fresh process before it gets its name. What has left is
remembered in private/ledger.jsonl: a second revision would show the mask, and is refused.
"""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pmp_ds.cli import option, parse_options
from pmp_ds.commands.exporting import export_derivative, export_run
from pmp_ds.config.precision import PRECISIONS
from pmp_ds.errors import exit_code, require, require_known
from pmp_ds.run_dir import RunDir


@dataclass(frozen=True, kw_only=True)
class OfDerivative:
    """For --derivative."""

    base: Path | None = option("FOLDER", None)
    """The release that it came from."""

    ticket: Path | None = option("FOLDER", None)
    """The run's own ticket."""

    store: Path | None = option("STORE", None)
    """Measure the loss on the validation blocks of this store."""

    blocks: int = 64
    """How many of those blocks."""


@dataclass(frozen=True, kw_only=True)
class Export(OfDerivative):
    """What leaves, and in which form."""

    run: Path | None = option("FOLDER", None)
    """A run's folder, runs/NAME."""

    derivative: Path | None = option("FOLDER", None)
    """A Hugging Face folder, fine-tuned from --base with --ticket: its frozen elements get changes
    like the ticket's, so that the two together do not show the mask."""

    check: Path | None = option("FOLDER", None)
    """Only check a finished folder against the list of what a release may hold."""

    checkpoint: str = option("latest|STEP|init", "latest")
    """Which weights: the newest checkpoint, that of an update, or the initial weights (private, for
    research; needs --out)."""

    out: Path | None = option("FOLDER", None)
    """A new folder. Default: runs/NAME/release."""

    private: bool = False
    """Not to leave: 0700, any update, not in the ledger."""

    dtype: str = dataclasses.field(default="bf16", metadata={"choices": PRECISIONS})
    """Precision of the weights. fp32: only of fp32 runs; fp16: of fp16 or fp32 runs."""

    max_shard_size: str = option("SIZE", "5GB")
    """Largest weight file."""

    license: str | None = option("ID", None)
    """Licence for the model card, such as apache-2.0."""

    language: tuple[str, ...] = option("CODE", ())
    """Languages of the data for the model card, such as en."""

    dataset: tuple[str, ...] = option("OWNER/NAME", ())
    """Data sets on the Hugging Face hub for the model card. Default: the `hf:` inputs of the
    data."""

    sign: Path | None = option("PEM", None)
    """Private key: sign the folder (extra `sign`)."""

    prompt: str | None = None
    """Let the release continue this text at the end."""

    another_revision: str | None = option("REASON", None)
    """Let a second release of the same initial weights or an intermediate one leave, although it
    can show the mask; the reason goes into the ledger."""

    base_is_private: bool = False
    """State that the weights of init.weights never left their owner, so that the release of a run
    that started from them does not show its mask."""

    allow_public_mask: bool = False
    """Release a run whose initial weights came from init.seed, so that anyone can compute its
    mask."""

    def __post_init__(self) -> None:
        given = [one for one in (self.run, self.derivative, self.check) if one is not None]
        require(len(given) == 1, "name one of --run, --derivative and --check; see --help")
        require_known("--dtype", self.dtype, PRECISIONS, "precisions")
        require(self.blocks >= 1, f"--blocks {self.blocks} must be at least 1")
        which = self.checkpoint
        require(
            which in ("latest", "init") or which.isdecimal(),
            f"--checkpoint {which} is neither `latest`, an update's number, nor `init`",
        )


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_options(Export, argv, prog="pmp-ds export", description=__doc__)
    if args.check is not None:
        from pmp_ds.release.allow_list import require_clean

        require_clean(args.check)
        print(f"{args.check}: nothing in it but what a release may hold")
        return
    from pmp_ds.release.model_card import check_metadata

    check_metadata(args.language, args.dataset)
    if args.sign is not None:
        from pmp_ds.release.signing import require_signing

        require_signing(args.sign)
    if args.derivative is not None:
        summary = export_derivative(args, args.derivative)
    else:
        assert args.run is not None
        summary = export_run(args, RunDir(args.run))
    print(
        f"{summary.out}: {summary.num_params:,} parameters, {summary.total_bytes / 1e6:,.1f} MB "
        f"in {summary.dtype}, {len(summary.files)} files"
    )
    same = "the same logits" if summary.logits_difference == 0 else "logits within rounding"
    print(f"loaded in a fresh process without pmp_ds: same bytes, {same}")
    if args.checkpoint == "init" or args.private:
        print(
            "warning: these weights and those of another update together are the mask: keep them "
            "private",
            file=sys.stderr,
        )
    elif args.license is None:
        print(
            "warning: the model card names no licence, so nobody knows what they may do with the "
            "release: name one with --license, such as apache-2.0",
            file=sys.stderr,
        )
    if args.prompt is not None:
        from pmp_ds.release.export import generate_sample

        print(generate_sample(summary.out, args.prompt))


def command(argv: Sequence[str] | None = None) -> int:
    """Run `pmp-ds export` and return its exit code."""
    return exit_code(lambda: main(argv))


if __name__ == "__main__":
    raise SystemExit(command())
