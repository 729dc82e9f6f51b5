"""Private Mask Pre-Training (arXiv 2602.00446) on DeepSpeed."""

__version__ = "0.1.0"
