"""The guard of machines that storage cannot fence (law 7).

`program` is a process of its own, which imports nothing of ours; `client` is the supervisor's side of it. Instances and
supervisors call the client; no module imports the program.
"""
