"""``python -m bags_d2`` is ``bags-d2``."""

from .cli import main

if __name__ == "__main__":
    main()
