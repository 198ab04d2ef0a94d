"""``python -m cm3leon``: the same as the command ``cm3leon``."""

from cm3leon.cli.app import main

if __name__ == "__main__":
    main()
