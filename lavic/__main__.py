"""`python -m lavic COMMAND ...`, the same as the `lavic` command."""

from lavic.cli import entry

if __name__ == "__main__":
    entry()
