"""The GPU tests for machines without a GPU: a pretend CUDA device, and the product on it."""
