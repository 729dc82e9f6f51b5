"""Measurements of a finished model's abilities and of its ticket, in plain torch."""
