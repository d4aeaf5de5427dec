"""One QEMU process: what it needs from its host, its start, its QMP connection, its end.

Here: the process and everything that is asked of it. Not here: whether it may run; the instance decides that.
Instances, the supervisor and single mode call it.
"""
