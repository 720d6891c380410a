"""``python -m job``: takes the signals, then imports the rest, whose libraries may start threads."""

import os

from job.engine.startup import open_standard_streams
from job.run.signals import Interruption


def main() -> None:
    """Run the command line, which ends the process."""
    open_standard_streams()
    interruption = Interruption(as_json=os.environ.get("JOB_LOG_FORMAT") == "json")
    interruption.install()
    from job import cli

    cli.main(interruption)


if __name__ == "__main__":
    main()
