"""Mask-free releases. Nothing here imports the ticket, the optimizer or training: code that cannot
see the mask cannot leak it."""
