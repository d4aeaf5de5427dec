"""One host: which instances are its own, what they are told, what HTTP shows, failover, the end of all guests.

Here: what there is once on a host. Not here: anything of one instance. The command line calls it.
"""
