"""``python -m job``."""

from job.cli import main

main()
