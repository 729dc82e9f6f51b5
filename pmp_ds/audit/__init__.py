"""Attacks on the secrecy of a release's mask, run by its owner. Plain torch: no DeepSpeed."""
