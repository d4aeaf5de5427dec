"""The cluster on a page: `kvmsupervisor web`, a process of its own that reads etcd, and writes wishes for who may.

Here: pages, `/api/v1` and a stream of changes, of the whole cluster; who asks, and what they may; what they order, done
by `cluster/acts/`. Not here: what a supervisor needs; a supervisor imports nothing of this room. Called by the command
line.
"""
