"""The whole cluster in one process, deterministic: production supervisors on fakes, one seed, one history.

`python -m tests.simulation --seed N` plays one history, `--shrink` takes away what a violation does not need.
docs/reliability.md, "Simulation", says what is played and what is judged.
"""
