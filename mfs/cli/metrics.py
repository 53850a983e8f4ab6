"""`mfs metrics`: what Prometheus is told of a mount."""

from __future__ import annotations

import click

from mfs.cli.page import Page, json_option
from mfs.cli.targets import TREE_PATH
from mfs.cli.text import print_json


@click.command(
    cls=Page,
    short_help="Print a mount's metrics for Prometheus.",
    sections={
        "Examples": """\
mfs metrics /mnt/models
mfs metrics /mnt/models | grep mfs_demand_wait
mfs metrics --json . | jq '.[] | select(.name == "mfs_tier_bytes")'
mfs mount --metrics-addr 127.0.0.1:9400 …    the same for Prometheus, at /metrics""",
        "Files": """\
tools/deploy/observe    a Grafana dashboard, alert rules and a runbook for them""",
    },
)
@click.argument("path", default=".", type=TREE_PATH)
@click.option("--openmetrics", is_flag=True, help="In OpenMetrics 1.0 instead of Prometheus' text format 0.0.4.")
@json_option
def metrics(path: str, openmetrics: bool, as_json: bool) -> None:
    """Print the metrics of the mount PATH lies in, as Prometheus reads them.

    Every number that the daemon counts, asked through its control socket. --json: a list of families, each with its
    samples.
    """
    from mfs.cli.targets import targets

    (target,) = targets([path])
    text = target.client.metrics("application/openmetrics-text" if openmetrics else "text/plain")
    if as_json:
        from mfs.metrics.exposition import parsed

        print_json(parsed(text, openmetrics=openmetrics))
    else:
        print(text, end="")
