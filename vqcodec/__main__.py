"""`python -m vqcodec` is the command line `vqcodec`."""

from cli import main

if __name__ == "__main__":
    main()
