"""Private Mask Pre-Training (arXiv 2602.00446) on DeepSpeed."""

from pmp_ds import account

__version__ = "0.2.0"

account.complete()
