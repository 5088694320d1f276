"""`python -m jmlp` is the `jmlp` command."""

from jmlp.cli import entry

if __name__ == "__main__":
    entry()
