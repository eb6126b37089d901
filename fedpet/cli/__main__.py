"""Run the command line by `python -m fedpet.cli`."""

from fedpet.cli.main import main

if __name__ == "__main__":
    main()
