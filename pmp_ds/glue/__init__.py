"""The GLUE tasks of the paper: their data, and their metrics. Imports without torch."""
