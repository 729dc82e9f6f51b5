"""Numbers of a run: metrics.jsonl (records), and what else is fed from it (writer).

Nothing here may depend on which elements are in the ticket. Reading needs no torch.
"""

from pmp_ds.log.records import TIMINGS, Start, begin, read_metrics, read_starts

__all__ = ["TIMINGS", "Start", "begin", "read_metrics", "read_starts"]
