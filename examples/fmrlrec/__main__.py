"""python -m examples.fmrlrec."""

from examples.fmrlrec.cli import main

if __name__ == "__main__":
    main()
