"""`python -m turnout`: the command `turnout`, also from a tree that is not installed."""

from turnout.launch.cli.main import main

if __name__ == "__main__":
    main()
