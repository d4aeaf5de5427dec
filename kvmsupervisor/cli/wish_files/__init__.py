"""Wishes as files: `export` writes them, `apply` makes etcd as the files say. docs/wish-files.md, decision 0040.

What people write in their files is theirs: no command changes a file. Locks, placements and statuses are never in one.
"""
