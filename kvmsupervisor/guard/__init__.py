"""The guard of machines that storage cannot fence (law 7).

`program` is a process of its own, which imports nothing of ours; `client` is the guard as its supervisor sees it.
Instances and supervisors call the client; nobody imports the program.
"""
