"""``python -m litapp`` is ``litapp``."""

from litapp.cli import main

if __name__ == "__main__":
    main()
