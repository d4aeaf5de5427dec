"""`python -m kvmsupervisor` is `kvmsupervisor`."""

from kvmsupervisor.cli.main import main

if __name__ == "__main__":
    main()
