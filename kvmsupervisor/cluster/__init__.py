"""This host among others, as etcd tells it: session, history, keys in step, locks, statuses, fences.

Here: what is read from etcd and written to it, and which storage client belongs to which instance. Not here: what a
machine does about it. Machines, instances and supervisors call this room; it calls adapters only.
"""
