"""What people do to instances and hosts: wishes as keys, each act one transaction that compares what it has read.

For the command line and the page, which refuse the same in the same words. No supervisor comes here: wishes are
people's.
"""
