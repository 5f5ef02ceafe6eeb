"""The old name of `python -m vitpyramid.tools.convert`."""

from vitpyramid.tools.convert import main

if __name__ == "__main__":
    raise SystemExit(main())
