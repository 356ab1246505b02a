"""`python -m q3n_functional` is `q3n`."""

from q3n_functional.cli import main

if __name__ == "__main__":
    main()
