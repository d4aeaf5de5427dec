"""This host among others, as etcd tells it: session, history, keys in step, locks, statuses, fences.

Here: what is read from and written to etcd, and whose storage client is whose. Not here: what follows from that for a
machine. Machines, instances and supervisors call it; it calls adapters only.
"""
