"""What an operator sets: the settings, where they come from, and what the log looks like.

Here: parsers of values, the table of settings, how etcd is reached by them. Not here: what a setting means for a
machine. Anybody above the adapters may ask.
"""
