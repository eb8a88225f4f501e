"""`covey keys`: who may use the cluster from other machines."""

import time
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from covey.cli.client import DEFAULT_URL, NodeClient
from covey.cli.console import err, out
from covey.cli.listing import Listing
from covey.cli.options import Json, Url, explained, print_json

app = typer.Typer(name="keys", help="API keys: who may use the cluster from other machines.", no_args_is_help=True)


@app.command()
@explained
def add(
    name: Annotated[str, typer.Argument(help="Whose key it is; the access log says it.")],
    url: Url = DEFAULT_URL,
    as_json: Json = False,  # noqa: FBT002 (Typer's way to a flag)
) -> None:
    """Make a key. It is shown once; every node of the cluster takes it."""
    with NodeClient(url) as node:
        made = node.add_key(name)
    if as_json:
        print_json(made)
        return
    err.print("This is the only time that the key is shown:", style="dim")
    out.print(made["key"], markup=False, soft_wrap=True)
    err.print("Clients send it as 'Authorization: Bearer KEY'; `covey --url` takes it from COVEY_API_KEY.", style="dim")


@app.command("list")
@explained
def list_keys(url: Url = DEFAULT_URL, as_json: Json = False) -> None:  # noqa: FBT002 (Typer's way to a flag)
    """List the keys by name."""
    with NodeClient(url) as node:
        keys = node.keys()
    if as_json:
        print_json(keys)
    elif keys:
        out.print(Listing(titles=("name", "id", "made"), rows=_rows(keys), folded=("name",)))
    else:
        out.print("There are no keys. `covey keys add NAME` makes one.")


@app.command()
@explained
def revoke(
    key: Annotated[str, typer.Argument(metavar="NAME_OR_ID")],
    url: Url = DEFAULT_URL,
) -> None:
    """End a key: it lets nobody in any more."""
    with NodeClient(url) as node:
        key_id = node.revoke_key(key)
    out.print(f"The key {key_id} is revoked.", markup=False)


def _rows(keys: Sequence[dict[str, Any]]) -> list[tuple[str, str, str]]:
    return [(each["name"], each["key_id"], time.strftime("%Y-%m-%d", time.gmtime(each["created_s"]))) for each in keys]
