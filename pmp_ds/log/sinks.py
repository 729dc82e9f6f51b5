"""What a run feeds besides metrics.jsonl and TensorBoard."""

from collections.abc import Sequence

from pmp_ds.config import Config
from pmp_ds.log.records import Start
from pmp_ds.log.textfile import Textfile
from pmp_ds.log.wandb_sink import Wandb
from pmp_ds.log.writer import Sink
from pmp_ds.run_dir import RunDir


def sinks_of(run: RunDir, config: Config, starts: Sequence[Start]) -> list[Sink]:
    """Return the sinks that the settings ask for; ``starts`` ends with this one. Raises UserError
    when one does not start."""
    sinks: list[Sink] = [Textfile(run, config, starts)]
    if config.run.wandb is not None:
        sinks.append(Wandb(run, config, starts))
    return sinks
