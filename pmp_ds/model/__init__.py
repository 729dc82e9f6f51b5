"""The model: architecture, secret or public initial weights, and the global element order."""
