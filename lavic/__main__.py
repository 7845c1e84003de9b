"""`python -m lavic COMMAND ...`: the same as the `lavic` command."""

from lavic.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
