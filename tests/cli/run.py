"""The command line, as a file."""

from causal_probe.cli import main

if __name__ == "__main__":
    main()
