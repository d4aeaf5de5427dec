"""The cluster on a page: `kvmsupervisor web`, a process of its own that only reads etcd.

Here: pages, `/api/v1` and a stream of changes, of the whole cluster. Not here: anything that writes, and anything that
a supervisor needs; a supervisor imports nothing of this room. Called by the command line.
"""
