"""One QEMU that lives and dies with its container: `exec` with an instance, or with options of its own.

It shares instances and machines with the supervisor, and nothing else of it. The command line calls it.
"""
