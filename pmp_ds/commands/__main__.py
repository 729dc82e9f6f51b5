"""`python -m pmp_ds.commands` is `pmp-ds`, for `pmp_ds.launch`."""

from pmp_ds.commands import main

if __name__ == "__main__":
    raise SystemExit(main())
