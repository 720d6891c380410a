"""``python -m tests.cluster --context NAME``: every scenario against that cluster."""

from __future__ import annotations

import shutil
import signal
import sys

import click

from tests.cluster.kubectl import Cluster, Unmet
from tests.cluster.scenarios import SCENARIOS
from tests.cluster.suite import run_all


@click.command()
@click.option("--context", required=True, help="The cluster, as `kubectl config get-contexts` names it.")
@click.option("--image", help="The job's image; default: as the manifests name it, loaded into the nodes.")
@click.option("--namespace", default="cifar-residual-job-test", help="Made for the suite and removed.")
@click.option("--only", help="Scenarios whose names contain this; those that they build on come too.")
def main(context: str, image: str | None, namespace: str, only: str | None) -> None:
    """Run the scenarios on a cluster and print one table."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the namespace goes then, too
    cluster = Cluster(context, namespace, shutil.which("kubectl") or "kubectl")
    chosen = {
        name: scenario
        for name, scenario in SCENARIOS.items()
        if not only or only in name or name.startswith("undisturbed")
    }
    try:
        sys.exit(run_all(cluster, image, chosen))
    except Unmet as problem:
        raise click.ClickException(str(problem)) from problem


if __name__ == "__main__":
    main()
