"""`console`: the terminal of a guest's serial port, and the log before it."""
