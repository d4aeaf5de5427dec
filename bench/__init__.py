"""The budgets, measured: each figure beside its reference, in one run. `make bench`, or `python -m bench --help`."""
