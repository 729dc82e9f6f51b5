"""What else was measured of the models: losses on text, last words, tasks of other harnesses."""

from collections.abc import Iterator, Sequence

from pmp_ds.results import Result
from pmp_ds.study.glue_tables import arms
from pmp_ds.study.tables import Table


def table_other(results: Sequence[Result]) -> Table:
    """One line per arm and measurement; with several models of an arm one line each."""
    found = [(result.arm, *line) for result in results for line in _lines(result)]
    order = arms(arm for arm, *_ in found)
    found.sort(key=lambda line: (line[1], order.index(line[0])))
    return Table(
        "models", "The models as they are released.", ("Arm", "Measurement", "Value"), found
    )


def _lines(result: Result) -> Iterator[tuple[str, str]]:
    values, settings = result.values, result.settings
    match result.kind:
        case "pretrain":
            tokens = f"{settings['tokens']:,}"
            yield f"Pretraining: validation loss after {tokens} tokens", _nats(values["val_loss"])
        case "perplexity":
            text = f"{settings.get('split', 'validation')} text {str(settings['store'])[:6]}"
            yield f"Loss on {text}", _nats(values["loss"])
        case "last_word":
            yield "Last word, accuracy", f"{100 * values['accuracy']:.2f}%"
        case "lm_eval":
            for name, metrics in values["metrics"].items():
                for metric, value in metrics.items():
                    yield f"lm-eval {name}, {metric.removesuffix(',none')}", f"{value:.4g}"


def _nats(loss: float) -> str:
    return f"{loss:.4f} nats per token"
