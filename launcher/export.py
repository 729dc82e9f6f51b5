"""Turn a run into a mask-free Hugging Face folder.

    python launcher/export.py --run runs/demo
    python launcher/export.py --run runs/demo --checkpoint 500 --out /tmp/step-500
    python launcher/export.py --run runs/demo --prompt "def main("

The folder holds dense weights, config, tokenizer, model card and SHA256SUMS, and nothing that
names the ticket. It has been loaded in a fresh process before it gets its name.
"""

import argparse
import datetime
import shutil
import sys
from pathlib import Path

from pmp_ds.cli import PlainParser
from pmp_ds.errors import UserError, exit_code
from pmp_ds.run_dir import RunDir, make_private
from pmp_ds.train.run_facts import export_facts, load_config


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = PlainParser("export.py", __doc__)
    add = parser.add_argument
    add("--run", type=Path, required=True, metavar="FOLDER", help="a run's folder, runs/NAME")
    add(
        "--checkpoint",
        default="latest",
        metavar="latest|STEP|init",
        help="which weights: the newest checkpoint, that of an update, or the initial weights "
        "(private, for research; needs --out). Default: latest",
    )
    add("--out", type=Path, metavar="FOLDER", help="a new folder. Default: runs/NAME/release")
    add("--dtype", choices=("bf16", "fp32"), default="bf16", help="fp32: only of fp32 runs")
    add("--max-shard-size", default="5GB", metavar="SIZE", help="largest weight file, such as 5GB")
    add("--license", metavar="ID", help="licence for the model card, such as apache-2.0")
    add("--prompt", metavar="TEXT", help="let the release continue TEXT at the end")
    add(
        "--allow-public-mask",
        action="store_true",
        help="release a run whose initial weights came from init.seed, so that anyone can compute "
        "its mask",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    run = RunDir(args.run)
    _check(args, run)
    initial = args.checkpoint == "init"
    config = load_config(run)
    public = config.init.seed is not None and config.mask.source != "none"
    if public and not (args.allow_public_mask or initial):
        raise UserError(
            f"{args.run} started from the public seed init.seed, so anyone can compute its mask: "
            "train with init.seed unset, or pass --allow-public-mask to release it as it is"
        )
    # Slow imports come after the quick checks.
    from pmp_ds.release.export import export, generate_sample, require_absent
    from pmp_ds.release.model_card import CardFacts
    from pmp_ds.train import plain_weights

    out = args.out or run.release
    require_absent(out)
    scratch = run.init / ".weights.incomplete"  # swept by the next pretrain.py too, after a kill
    try:
        if initial:
            shutil.rmtree(scratch, ignore_errors=True)
            weights = plain_weights.of_init(run, scratch)
        else:
            step = None if args.checkpoint == "latest" else int(args.checkpoint)
            weights = plain_weights.of_checkpoint(run, step)
        card = CardFacts(
            **export_facts(run, weights.updates, weights.val_loss),
            date=datetime.datetime.now(datetime.UTC).date().isoformat(),
            license=args.license,
        )
        summary = export(
            weights.folder,
            out,
            tokenizer_dir=run.tokenizer,
            card=card,
            dtype=args.dtype,
            max_shard_size=args.max_shard_size,
            private=initial,
        )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(
        f"{summary.out}: {summary.num_params:,} parameters, {summary.total_bytes / 1e6:,.1f} MB "
        f"in {summary.dtype}, {len(summary.files)} files"
    )
    same = "the same logits" if summary.logits_difference == 0 else "logits within rounding"
    print(f"loaded in a fresh process without pmp_ds: same bytes, {same}")
    if initial:
        print(
            "warning: these initial weights and the trained ones together are the mask: keep them "
            "private",
            file=sys.stderr,
        )
    if args.prompt is not None:
        print(generate_sample(out, args.prompt))


def _check(args: argparse.Namespace, run: RunDir) -> None:
    if not run.private.is_dir():
        raise UserError(f"--run {args.run} is not a run: {run.private} does not exist")
    make_private(run.private)
    which = args.checkpoint
    if which not in ("latest", "init") and not which.isdecimal():
        raise UserError(f"--checkpoint {which} is neither `latest`, an update's number, nor `init`")
    if which == "init":
        release = run.release.resolve()
        if args.out is None:
            raise UserError(
                "--checkpoint init needs --out: initial weights beside a release show its mask, "
                "so they never go to the release folder by default"
            )
        target = args.out.resolve()
        if target == release or release in target.parents:
            raise UserError(
                f"--out {args.out} is inside {run.release}, which leaves: initial weights there "
                "would show the mask. Name a private folder"
            )


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
