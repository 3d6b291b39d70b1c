from ..datasets.processes import wait_without_spinning

wait_without_spinning()

from .cli import main  # noqa: E402

raise SystemExit(main())
