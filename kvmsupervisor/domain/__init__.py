"""Pure data and decisions: no asyncio, no clock, no files, no sockets; `now` is an argument."""
