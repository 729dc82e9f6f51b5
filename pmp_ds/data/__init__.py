"""Packed stores, read: what is in one, whether it is intact, and its blocks in training's order."""
