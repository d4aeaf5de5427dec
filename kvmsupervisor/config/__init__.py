"""What an operator sets: the settings, where they come from, and what the log looks like.

Here: the declarations of the settings, how their values are found, how they say that etcd is reached. Not here: what a
setting means for a machine, and the keys of an instance (`domain/parse_keys.py`). Every room above the
adapters may ask.
"""
