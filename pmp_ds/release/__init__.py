"""Mask-free releases. Nothing here imports the ticket, the optimizer or training: what cannot see
the mask cannot leak it."""
