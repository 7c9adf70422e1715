"""`python -m melinoe` is the command line, so that launchers can start it as a module."""

from melinoe.cli import main

if __name__ == "__main__":
    main()
