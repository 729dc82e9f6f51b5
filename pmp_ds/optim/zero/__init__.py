"""A masked optimizer under each ZeRO stage: which elements a rank owns, and how it updates them.

The one place that touches DeepSpeed's private attributes besides engine/portable.py
(tests/unit/optim/test_contract.py lists them); written for the DeepSpeed of constraints.txt.
"""

from pmp_ds.optim.zero.shards import Fragment, ZeroShards, flat_masks
from pmp_ds.optim.zero.stages import shards_of
from pmp_ds.optim.zero.step import MaskedStep

__all__ = ["Fragment", "MaskedStep", "ZeroShards", "flat_masks", "shards_of"]
