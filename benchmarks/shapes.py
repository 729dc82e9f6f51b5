"""What the benchmarks of training train: a model by name, a batch, the settings of both."""

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from pmp_ds import dist, shipped
from pmp_ds.config import ModelConfig, TrainConfig
from pmp_ds.config.precision import PRECISIONS
from pmp_ds.engine.cut import Cut
from pmp_ds.errors import UserError, require
from pmp_ds.model.build import build_model, model_config
from pmp_ds.model.parameters import trained_shapes
from pmp_ds.strict_yaml import read_settings
from pmp_ds.ticket.mask import ParamMask, pack


@dataclass(frozen=True)
class Shape:
    """A model and the batch it is measured with unless the options name another."""

    model: Callable[[], ModelConfig]
    vocab_size: int
    batch: tuple[int, int]  # sequences over all ranks, tokens in each


def _of_recipe(name: str) -> Callable[[], ModelConfig]:
    return lambda: ModelConfig(**read_settings(Path(shipped.recipe(name)), name)["model"])


def _llama(hidden_size: int, num_layers: int, intermediate_size: int) -> Callable[[], ModelConfig]:
    return lambda: ModelConfig(
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=4,
        intermediate_size=intermediate_size,
    )


SHAPES = {
    "tiny": Shape(_llama(32, 2, 64), 128, (4, 16)),
    "10m": Shape(_llama(256, 8, 704), 8192, (8, 64)),
    "gpt2-small": Shape(_of_recipe("gpt2-small"), 50257, (32, 256)),
    "tinyllama-1.1b": Shape(_of_recipe("tinyllama-1.1b"), 32000, (32, 256)),
}


def training_arguments(description: str) -> argparse.ArgumentParser:
    """Return the options that the benchmarks of whole updates share."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="gpt2-small" if cuda else "10m", help="the model")
    add(
        "--batch", type=_batch, help="SEQUENCESxTOKENS per update over all ranks; by shape if unset"
    )
    add("--micro-batch", type=int, default=1 << 20, help="most sequences per forward pass")
    precisions = [name for name, one in PRECISIONS.items() if not one.scales_loss]
    add("--precision", choices=precisions, default="bf16" if cuda else "fp32")
    add("--stage", type=int, choices=range(4), default=1, help="of ZeRO")
    add("--offload", action="store_true", help="the optimizer in host memory, from stage 1 on")
    add("--density", type=float, default=0.7, help="fraction that is kept")
    add(
        "--compile",
        choices=("auto", "layers", "none"),
        default="auto",
        help="train.compile of ours",
    )
    add("--repeats", type=int, default=7 if cuda else 21, help="timed rounds; the median counts")
    add("--updates", type=int, default=5 if cuda else 1, help="updates in each turn")
    add("--local_rank", help=argparse.SUPPRESS)  # from the launcher of DeepSpeed
    return parser


def _batch(text: str) -> tuple[int, int]:
    sequences, _, tokens = text.partition("x")
    if not (sequences.isdecimal() and tokens.isdecimal() and int(sequences) and int(tokens) > 1):
        raise argparse.ArgumentTypeError(f"{text!r} is not SEQUENCESxTOKENS, such as 32x256")
    return int(sequences), int(tokens)


def start(main: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser) -> None:
    """Read the options, join the other ranks and run ``main``."""
    options = parser.parse_args()
    try:
        dist.init()
        main(options)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    dist.shutdown()


class Setup:
    """The options, read; the same on every rank."""

    def __init__(self, options: argparse.Namespace) -> None:
        shape = SHAPES[options.shape]
        self.device, self.stage, self.options = dist.device(), options.stage, options
        require(options.stage > 0 or not options.offload, "--offload: needs --stage 1, 2 or 3")
        batch: tuple[int, int] = options.batch or shape.batch
        self.num_sequences, self.num_tokens = batch
        self.train = TrainConfig(
            global_batch_size=self.num_sequences,
            micro_batch_size=options.micro_batch,
            precision=options.precision,
            compile=options.compile,
            lr=3e-4,
            warmup_steps=0,
            betas=(0.9, 0.95),
            weight_decay=0.1,
        )
        self.cut = Cut.of(self.train, dist.world_size())
        require(
            self.cut.repeated == 0,
            f"--batch: {self.num_sequences} sequences do not divide into equal micro-batches of at "
            f"most {options.micro_batch} on {dist.ranks_in_words()}: choose other numbers",
        )
        self.hf_config = model_config(
            shape.model(),
            vocab_size=shape.vocab_size,
            eos_id=2,
            bos_id=None,
            block_size=self.num_tokens,
        )
        torch.manual_seed(0)
        self._model = build_model(self.hf_config)  # takes ten times as long as a copy
        share = self.num_sequences // dist.world_size()
        generator = torch.Generator().manual_seed(dist.rank())
        self.batch = torch.randint(
            shape.vocab_size, (share, self.num_tokens), generator=generator
        )  # of this rank
        if self.on_gpu:
            self.batch = self.batch.pin_memory()

    def model(self) -> PreTrainedModel:
        """Return the model, fp32 on CPU, the same at every call and on every rank."""
        return copy.deepcopy(self._model)

    def mask(self, model: PreTrainedModel) -> ParamMask:
        """Return a random mask, which takes less time to make than a ticket."""
        generator = torch.Generator().manual_seed(1)
        shapes = trained_shapes(model)
        return ParamMask(
            bits={
                name: pack(torch.rand(shape, generator=generator) < self.options.density)
                for name, shape in shapes.items()
            },
            shapes=shapes,
        )

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def in_words(self, num_params: int) -> str:
        options = self.options
        return (
            f"{options.shape}, {num_params:,} parameters, {self.cut.in_words()} of "
            f"{self.num_tokens} tokens, {options.precision}, ZeRO {self.stage}, "
            f"density {options.density}{', offload' * options.offload}, "
            f"median of {options.repeats} rounds"
        )
