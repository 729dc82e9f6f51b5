"""Releases tried with the programs that people load them with: `make clients`."""
