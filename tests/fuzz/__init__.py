"""Feed hostile values and damaged files to the command line; `python -m tests.fuzz` runs longer."""
