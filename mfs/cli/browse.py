"""`mfs page`: where a mount's page for a browser is, with what lets in."""

from __future__ import annotations

import click

from mfs.cli.page import Page, json_option
from mfs.cli.targets import TREE_PATH
from mfs.cli.text import clean, print_json
from mfs.errors import NotFoundError


@click.command(
    cls=Page,
    short_help="Where a mount's page for a browser is.",
    sections={
        "Examples": """\
mfs mount s3://models /mnt/models --page-addr 127.0.0.1:8650
xdg-open "$(mfs page /mnt/models)"
ssh -L 8650:127.0.0.1:8650 node mfs page /mnt/models     from elsewhere""",
        "Security": """\
The address ends in '#token=…': whoever has it may prefetch, pin, evict and refresh. Only
root and the user who mounted can read it. Browsers do not send what stands behind '#'.""",
    },
)
@click.argument("path", type=TREE_PATH)
@json_option
def page(path: str, as_json: bool) -> None:
    """Print the address of the page that shows the mount PATH lies in, with its token.

    The page shows tiers, models, what is fetched, what readers wait for, and the last load; it prefetches, pins,
    evicts and refreshes. The daemon serves it where it was mounted with --page-addr.
    """
    from mfs.cli.targets import targets
    from mfs.page.where import page_url

    (target,) = targets([path])
    try:
        url = page_url(target.served.socket)
    except NotFoundError:
        place = clean(target.served.mountpoint)
        raise NotFoundError(
            f"{place} serves no page: 'mfs mount --handover --page-addr 127.0.0.1:8650 {place}' makes it, without "
            f"unmounting"
        ) from None
    if as_json:
        print_json({"mountpoint": target.served.mountpoint, "url": url})
    else:
        print(url)
