"""`python -m moert`: the command line."""

from moert.cli.main import run

if __name__ == "__main__":
    run()
