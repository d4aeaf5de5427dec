"""The chaos suite: hosts that fail in every way, and machines whose disks tell who wrote to them.

`records` and `downtime` judge and are pure; `guest` is what writes, `disk` is how its records are read.
"""
