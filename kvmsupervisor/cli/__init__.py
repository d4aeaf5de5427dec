"""The command line: `kvmsupervisor …`."""
