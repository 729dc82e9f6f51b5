"""Packed stores for reading: their content, their integrity, and their blocks in training order."""
