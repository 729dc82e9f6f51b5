"""Untrusted files crafted to do harm: every kind of file, every variant.

    make crafted                               a table: inputs by kind, tracebacks, hangs, memory
    python -m tests.helpers.crafted            the same
    python -m tests.helpers.crafted KIND [TEXT]   each input of one kind, and its result

A kind (kinds.py) is a valid folder and the code that opens it; an input (variants.py) is a change
to it. A worker (runner.py) opens one after the other: each works, or is refused in one printable
line. The settings of every command and every key of DeepSpeed's JSONs are kinds as well.
"""
