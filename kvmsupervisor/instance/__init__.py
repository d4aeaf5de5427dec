"""One instance: observe, decide, act, until nothing of it is ours any more.

`worker` is the loop, `containment` keeps an error of ours within it, `context` is what all instances of a host share.
Not here: which instances there are. Supervisor and single mode call it.
"""
