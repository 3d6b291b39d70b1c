from ..datasets.processes import wait_without_spinning

wait_without_spinning()

from .cli import main  # noqa: E402

if __name__ == "__main__":
    main()
