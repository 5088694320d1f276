"""`python -m jmlp` is the `jmlp` command."""

from jmlp.cli.main import entry

if __name__ == "__main__":
    entry()
