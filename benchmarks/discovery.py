"""An update of discovery against an ordinary one of the same engine.

    python -m benchmarks.discovery

An update of discovery also adds up scores, selects a candidate and compares it with the last one.
Both take turns. Prints a table, then a line per figure; the exit code says only whether it ran.
"""

import argparse

from benchmarks.common import hardware, print_figure
from benchmarks.contenders import Ours
from benchmarks.shapes import Setup, start, training_arguments
from benchmarks.turns import Turns
from pmp_ds import dist
from pmp_ds.config import Config, MaskConfig
from pmp_ds.discover.discover import Discovery
from pmp_ds.model.parameters import num_params


class Discovering:
    """An update of discovery, on the engine of another contender."""

    title = "an update of discovery"
    deterministic = True

    def __init__(self, setup: Setup, ours: Ours) -> None:
        mask = MaskConfig(density=setup.options.density, score=setup.options.score)
        config = Config(train=setup.train, mask=mask)
        self._discovery = Discovery(ours.engine, config, ours.table)
        self._setup = setup

    def backward(self) -> None:
        """Do all of it: the step is not ours to make apart."""
        self._discovery.update(self._setup.batch)

    def step(self) -> None:
        pass


def main(options: argparse.Namespace) -> None:
    """Measure, and print on rank 0. Collective."""
    setup = Setup(options)
    turns, ours = Turns(setup.device, options.updates), Ours(setup, masked=False)
    turns.add("ordinary", lambda: ours)
    turns.add("discovery", lambda: Discovering(setup, ours))
    measured = turns.run(options.repeats)
    if dist.rank() == 0:
        print(f"hardware: {hardware(setup.device)}")
        print(f"{setup.in_words(num_params(ours.table))}, score {options.score}")
        print(f"{'':34}{'ms':>9}{'CPU ms':>9}")
        for name, one in measured.items():
            print(
                f"{turns.contenders[name].title:34}{one.median('ms'):9.1f}{one.median('cpu_ms'):9.1f}"
            )
        ratio = measured["discovery"].against(measured["ordinary"], "ms")
        print_figure("discovery_update_vs_ordinary", ratio, 1.05 if setup.on_gpu else None)
        if not setup.on_gpu:
            cpu = measured["discovery"].against(measured["ordinary"], "cpu_ms")
            print_figure("discovery_cpu_time_vs_ordinary", cpu)


def arguments() -> argparse.ArgumentParser:
    parser = training_arguments("an update of discovery against an ordinary one")
    parser.add_argument("--score", default=MaskConfig().score, help="mask.score")
    return parser


if __name__ == "__main__":
    start(main, arguments())
