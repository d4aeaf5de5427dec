"""One QEMU process: what it needs of its host, its start, the talk with it, its end.

Here: the process and all that is asked of it. Not here: whether it may run, which its instance decides. Instances,
supervisors and single mode call it.
"""
