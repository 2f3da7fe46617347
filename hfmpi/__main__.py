"""`python -m hfmpi` is the command `hfmpi`."""

from hfmpi.cli.main import entry

if __name__ == "__main__":
    entry()
