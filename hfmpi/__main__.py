"""Run the command `hfmpi` by `python -m hfmpi`."""

from hfmpi.cli.main import entry

if __name__ == "__main__":
    entry()
