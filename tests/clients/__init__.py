"""Releases loaded with common client programs: `make clients`."""
