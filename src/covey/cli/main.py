"""The commands. Each is a client of a node's HTTP API, but for `up`, which is a node, and `demo`, which starts some.

What only some commands need is imported where they run, so that the others start fast.
"""

import sys
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from covey.cli import bench, chat, keys, models, service, tables
from covey.cli.client import DEFAULT_PORT, DEFAULT_URL, LOOPBACK, CliError, NodeClient
from covey.cli.console import err, out
from covey.cli.naming import asked_for, id_of, local_path, model_to_place, named_instance, short_ids
from covey.cli.options import FAILURE_EXIT, Json, Url, explained, print_json, refuse_contradictions, refuse_url
from covey.control.routing import instance_status
from covey.schema.cluster import NODES_MAX, RANKS_MAX, SLOTS_MAX, TOKENS_MAX, ClusterState, InstancePhase
from covey.schema.model import KvCacheType, Quantizing

app = typer.Typer(
    name="covey",
    help="Runs large language models on the devices you already own, joined into one cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(keys.app, name="keys")
app.add_typer(service.app, name="service")
app.add_typer(models.app, name="models")
app.command(help=bench.HELP)(bench.bench)


join_code_app = typer.Typer(help="Show or change the code by which devices join.")
app.add_typer(join_code_app, name="join-code")

NoAuth = Annotated[bool, typer.Option("--no-auth", help="Ask nobody for an API key.")]
RequireKey = Annotated[bool, typer.Option("--require-key", help="Ask for an API key on this machine, too.")]
LogRequests = Annotated[bool, typer.Option("--log-requests", help="A line for each request on standard error.")]
AnyoneJoins = Annotated[bool, typer.Option("--open", help="Without a join code: anyone on the network joins.")]
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", min=1, help="The longest answer, in tokens.")]
Temperature = Annotated[float | None, typer.Option("--temperature", min=0.0, max=2.0, help="0 is greedy.")]
Exact = Annotated[
    bool, typer.Option("--exact", help="Slower, and an interrupted answer goes on as it would have gone.")
]
Quantize = Annotated[Quantizing | None, typer.Option(help="Round matrices in full precision to 4 or 8 bits.")]
KvCache = Annotated[
    KvCacheType | None,
    typer.Option(help="Keep keys and values in 16-bit floats: half the memory, tokens come a little slower."),
]
Draft = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="A smaller model that guesses what comes next: of the same family, with about a tenth of the weights or "
        "less. It pays for one request at a time.",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Tell only what is wrong, not what happens.")]
UntilStdinCloses = Annotated[
    bool, typer.Option("--until-stdin-closes", help="End when standard input does: with the program that holds it.")
]


@app.command()
@explained
def up(
    host: Annotated[str, typer.Option(help="Where the HTTP API listens.")] = LOOPBACK,
    port: Annotated[int, typer.Option(min=0, max=65535, help="The HTTP API's port.")] = DEFAULT_PORT,
    data_dir: Annotated[Path | None, typer.Option(help="Identity and logs of this node.")] = None,
    name: Annotated[str | None, typer.Option(help="What people call this node; default: the host's name.")] = None,
    peer: Annotated[
        list[str] | None, typer.Option(help="A node that discovery misses: HOST or HOST:PORT, with its API's port.")
    ] = None,
    join: Annotated[
        str | None,
        typer.Option(help="Join the cluster of this code, once and for all; - asks for it. COVEY_JOIN does the same."),
    ] = None,
    interface: Annotated[
        list[str] | None,
        typer.Option(help="Meet other nodes here alone: an interface's name or address; default: all private ones."),
    ] = None,
    anyone_joins: AnyoneJoins = False,  # noqa: FBT002 (Typer's way to a flag)
    until_stdin_closes: UntilStdinCloses = False,  # noqa: FBT002
    allow_host: Annotated[
        list[str] | None, typer.Option(help="A name by which clients call this node, beside the machine's own.")
    ] = None,
    allow_origin: Annotated[
        list[str] | None, typer.Option(help="Web pages that may use the API, as https://chat.example.")
    ] = None,
    no_auth: NoAuth = False,  # noqa: FBT002
    require_key: RequireKey = False,  # noqa: FBT002
    log_requests: LogRequests = False,  # noqa: FBT002
    quiet: Quiet = False,  # noqa: FBT002
) -> None:
    """Run one node in the foreground, and tell what happens in the cluster."""
    from covey.cli import joining  # noqa: PLC0415 (as the first lines say; so are the others)
    from covey.cli.log import Log  # noqa: PLC0415
    from covey.node import NodeOptions, run_node  # noqa: PLC0415

    refuse_contradictions({"no_auth": no_auth, "require_key": require_key, "anyone_joins": anyone_joins, "join": join})
    if not anyone_joins:
        joining.take_code(join)
    options = NodeOptions(
        host=host,
        port=port,
        data_dir=data_dir,
        name=name,
        peers=tuple(peer or ()),
        interfaces=tuple(interface or ()),
        anyone_joins=anyone_joins,
        until_stdin_closes=until_stdin_closes,
        allowed_hosts=tuple(allow_host or ()),
        allowed_origins=tuple(allow_origin or ()),
        is_open=no_auth,
        asks_everybody=require_key,
        logs_requests=log_requests,
    )
    log = Log(partial(joining.how_to_join, is_open=anyone_joins), is_quiet=quiet)
    raise typer.Exit(run_node(options, log.announce, log.tell))


service.offer_install(up)


@app.callback(invoke_without_command=True)
def about(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,  # noqa: FBT002 (Typer's way to a flag)
) -> None:
    if version:
        chat.write(f"covey {metadata.version('covey')}\n")
    elif context.invoked_subcommand is None:
        out.print(context.get_help())


identity_app = typer.Typer(help="Who this node is to the others.", no_args_is_help=True)
app.add_typer(identity_app, name="identity")


@identity_app.command("new")
@explained
def identity_new(
    data_dir: Annotated[Path | None, typer.Option(help="The node's data folder, as given to `covey up`.")] = None,
) -> None:
    """Make this node another one, where its data folder was copied from a second machine."""
    from covey.effects import identity, paths  # noqa: PLC0415

    try:
        node_id = identity.renew(paths.node_folder(data_dir))
    except identity.IdentityError as error:
        raise CliError(str(error)) from None
    out.print(f"This node is now {node_id[:8]}. Start it with [bold]covey up[/].")


@app.command()
@explained
def run(
    model: str,
    prompt: Annotated[
        list[str] | None, typer.Argument(help="Without one: a conversation. What a pipe brings is added to it.")
    ] = None,
    url: Url = DEFAULT_URL,
    max_tokens: MaxTokens = None,
    temperature: Temperature = 0.7,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Draw from the best that hold this share.")] = 0.9,
    system: Annotated[str | None, typer.Option(help="What the model is told first; default: its own text.")] = None,
    exact: Exact = False,  # noqa: FBT002 (Typer's way to a flag)
    quantize: Quantize = None,
    draft: Draft = None,
    kv_cache: KvCache = None,
) -> None:
    """Ask a model; it is placed first if it is not yet. MODEL: a listed name, a GGUF file, or hf:OWNER/REPO/FILE."""
    from covey.cli.conversation import Conversation  # noqa: PLC0415
    from covey.cli.placing import Wanted, ensure_ready, shorter_context  # noqa: PLC0415

    given = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p}
    options = {key: value for key, value in given.items() if value is not None}
    with NodeClient(url) as node:
        node.cluster()  # what is wrong with the node is told before standard input ends, which may be never
        question = chat.question(prompt or ())
        wanted = Wanted(
            exact=exact or None, quantize=quantize, draft=draft_to_place(draft, node.url), kv_cache=kv_cache
        )
        ready = ensure_ready(node, model_to_place(model, node.url), wanted)
        if ready.is_new and (note := shorter_context(ready.instance)):
            err.print(note, style="dim", soft_wrap=True)
        model_id = ready.instance.card.model_id
        if question:
            chat.single(node, model_id, question, options, system)
        else:
            Conversation(node, model_id, options, system).hold()


@app.command()
@explained
def place(
    model: str,
    nodes: Annotated[
        int | None, typer.Option(min=1, max=NODES_MAX, help="Spread it over at least so many nodes.")
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=2, max=TOKENS_MAX, help="Tokens of prompt and answer together.")
    ] = None,
    slots: Annotated[int | None, typer.Option(min=1, max=SLOTS_MAX, help="How many requests run at a time.")] = None,
    tensor: Annotated[
        int | None, typer.Option(min=1, max=RANKS_MAX, help="How many nodes share each layer; --nodes is a multiple.")
    ] = None,
    another: Annotated[bool, typer.Option("--another", help="Also where it is placed already.")] = False,  # noqa: FBT002
    exact: Exact = False,  # noqa: FBT002
    quantize: Quantize = None,
    draft: Draft = None,
    kv_cache: KvCache = None,
    url: Url = DEFAULT_URL,
    as_json: Json = False,  # noqa: FBT002 (Typer's way to a flag)
) -> None:
    """Make a model ready on the cluster, and wait until it is."""
    from covey.cli import placing  # noqa: PLC0415

    with NodeClient(url) as node:
        wanted = placing.Wanted(
            node_count=nodes,
            context_length=context,
            slot_count=slots,
            exact=exact or None,
            quantize=quantize,
            rank_count=tensor,
            draft=draft_to_place(draft, node.url),
            kv_cache=kv_cache,
        )
        ready = (placing.make_ready if another else placing.ensure_ready)(node, model_to_place(model, node.url), wanted)
        state = node.cluster()
    rows, instance_id = tables.stage_rows(ready.instance, tables.node_names(state)), ready.instance.instance_id
    if as_json:
        told = {"instance_id": instance_id, "model_id": ready.instance.card.model_id, "nodes": rows}
        print_json({**told, "on_one_node_only": ready.on_one_node_only})
        return
    short = short_ids([instance_id, *(each.instance_id for each in state.instances)])[instance_id]
    out.print(placing.summary(ready, short), soft_wrap=True)
    out.print(tables.layers_table(rows))
    notes = " ".join(filter(None, (placing.drafted(ready.instance), placing.shorter_context(ready.instance))))
    if notes:
        out.print(f"\n{notes}", soft_wrap=True, markup=False)
    if ready.on_one_node_only:
        warn_of_one_copy(state)


@app.command()
@explained
def stop(
    instance: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Its id, the beginning of it, or its model.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Remove all instances.")] = False,  # noqa: FBT002
    url: Url = DEFAULT_URL,
) -> None:
    """Remove an instance; `covey ps` lists them."""
    if everything == (instance is not None):
        raise typer.BadParameter("Name one instance, or give --all.")
    with NodeClient(url) as node:
        state = node.cluster()
        placed = asked_for(state)
        chosen = placed if instance is None else [named_instance(placed, local_path(instance))]
        short = short_ids([id_of(each) for each in placed])
        for each in chosen:
            deleted = node.delete(id_of(each))
            out.print(f"{each.card.model_id} ({short[id_of(each)]}) is stopped.", markup=False)
            if deleted["on_one_node_only"]:
                warn_of_one_copy(state)
    if not chosen:
        out.print("No model is placed, so there is nothing to stop.")


@app.command()
@explained
def rebalance(
    instance: Annotated[str, typer.Argument(metavar="NAME", help="Its id, the beginning of it, or its model.")],
    url: Url = DEFAULT_URL,
) -> None:
    """Place an instance as it would be placed now, for example after a device came back.

    Answers that are under way pause for as long as that takes, and go on.
    """
    with NodeClient(url) as node:
        state = node.cluster()
        chosen = named_instance(state.instances, local_path(instance))
        status = instance_status(state, chosen)
        if status.phase is InstancePhase.FAILED:
            raise CliError(status.explanation)
        moved = node.rebalance(chosen.instance_id)
        stays = moved["instance_id"] == chosen.instance_id
        out.print(f"{chosen.card.model_id} {'stays where it is' if stays else 'is being moved'}.", markup=False)


@app.command()
@explained
def ps(url: Url = DEFAULT_URL, as_json: Json = False) -> None:  # noqa: FBT002 (Typer's way to a flag)
    """List the instances, and what waits for a place."""
    with NodeClient(url) as node:
        rows = tables.instance_rows(node.cluster())
    if as_json:
        print_json(rows)
    elif rows:
        out.print(tables.instances_table(rows))
    else:
        out.print("No model is placed. `covey place MODEL` places one; `covey models` lists them.")


@app.command()
@explained
def nodes(url: Url = DEFAULT_URL, as_json: Json = False) -> None:  # noqa: FBT002 (Typer's way to a flag)
    """List the nodes of the cluster, and what is wrong with the network or with one of them."""
    with NodeClient(url) as node:
        state = node.cluster()
    rows = tables.node_rows(state)
    if as_json:
        print_json(rows)
    else:
        out.print(tables.nodes_table(rows))
        for sentence in tables.notices(state):
            out.print(f"\nNote: {sentence}.", soft_wrap=True, markup=False)


@app.command()
@explained
def events(
    limit: Annotated[int, typer.Option(min=1, max=1000, help="The latest so many.")] = 50,
    url: Url = DEFAULT_URL,
    as_json: Json = False,  # noqa: FBT002 (Typer's way to a flag)
) -> None:
    """Tell what happened lately, as the node saw it."""
    with NodeClient(url) as node:
        happened = node.events(limit)
    if as_json:
        print_json(happened)
    else:
        out.print(tables.events_table(happened))


@app.command()
@explained
def demo(
    nodes: Annotated[int, typer.Option(min=1, max=16, help="How many nodes to start.")] = 2,
    once: Annotated[bool, typer.Option("--once", help="End after the answer.")] = False,  # noqa: FBT002
    prompt: Annotated[str, typer.Option(help="The first question.")] = "What is the capital of France?",
    max_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0, help="0 is greedy.")] = 0.0,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help=f"The API's port; default: {DEFAULT_PORT}, or the next free.")
    ] = None,
    exact: Exact = False,  # noqa: FBT002 (Typer's way to a flag)
    as_json: Json = False,  # noqa: FBT002 (Typer's way to a flag)
) -> None:
    """Start nodes on this machine, split the demo model over them, and ask it something."""
    from covey.cli.demo import DemoOptions, run_demo  # noqa: PLC0415

    options = DemoOptions(
        nodes=nodes,
        once=once,
        prompt=prompt,
        max_tokens=max_tokens,
        temperature=temperature,
        as_json=as_json,
        port=port,
        exact=exact,
    )
    try:
        run_demo(options)
    except KeyboardInterrupt:
        if once:
            raise
        err.print("All nodes have ended.", style="dim")


@app.command()
@explained
def doctor(
    context: typer.Context,
    url: Url = DEFAULT_URL,
    host: Annotated[str | None, typer.Option(help="As given to `covey up`, instead of --url.")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="As given to `covey up`.")] = None,
    peer: Annotated[
        list[str] | None, typer.Option(help="A node that is not found: HOST or HOST:PORT, with its API's port.")
    ] = None,
    interface: Annotated[list[str] | None, typer.Option(help="As given to `covey up`.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="As given to `covey up`.")] = None,
    anyone_joins: AnyoneJoins = False,  # noqa: FBT002 (Typer's way to a flag)
    as_json: Json = False,  # noqa: FBT002
) -> None:
    """Look for what is wrong, with a node or without one, and say what to do. Nothing is changed."""
    from covey.cli.doctor import looking, showing  # noqa: PLC0415 (the other commands start faster so)
    from covey.cli.doctor.finding import summary  # noqa: PLC0415

    if host is not None or port is not None:
        refuse_url(context)
        url = looking.url_of(host or LOOPBACK, port or DEFAULT_PORT)
    if err.is_terminal:
        err.print("Listening for other nodes takes some seconds.", style="dim")
    asked = looking.Asked(
        url=url,
        host=host or "",
        data_dir=data_dir,
        peers=tuple(peer or ()),
        interfaces=tuple(interface or ()),
        anyone_joins=anyone_joins,
    )
    found = looking.findings(asked)
    if as_json:
        print_json(showing.report(found))
    else:
        out.print(showing.listing(found))
        out.print(f"\n{summary(found)}", soft_wrap=True, markup=False)
    raise typer.Exit(FAILURE_EXIT if showing.has_problems(found) else 0)


@app.command()
@explained
def launcher(
    output: Annotated[Path, typer.Option(help="The folder in which Covey.app is made, or renewed.")] = Path(),
) -> None:
    """Make Covey.app for macOS, which asks for the local network where a plain program is kept out without a word."""
    from covey.desktop import bundle  # noqa: PLC0415 (the other commands start faster so)

    command = [sys.executable, "-P", "-m", "covey.cli"]
    try:
        made = bundle.write_bundle(output.expanduser().absolute(), command, metadata.version("covey"))
    except bundle.BundleError as error:
        raise CliError(f"{error}.") from None
    out.print(f"{made} is made.", soft_wrap=True, markup=False)
    if sys.platform != "darwin":
        out.print("It is for macOS, and of no use on this machine.", soft_wrap=True)
    err.print(
        f"On a Mac: open {made.name} in the Finder, or start {made.name}/{bundle.PROGRAM_FILE} with any options. macOS "
        "asks once whether Covey may find devices on the local network.",
        style="dim",
        soft_wrap=True,
        markup=False,
    )


@join_code_app.callback(invoke_without_command=True)
@explained
def join_code(context: typer.Context, as_json: Json = False) -> None:  # noqa: FBT002 (Typer's way to a flag)
    """Show how another device joins this one's cluster."""
    from covey.cli import joining  # noqa: PLC0415 (the other commands start faster so)

    if context.invoked_subcommand is None:
        print_json(joining.code_report()) if as_json else joining.show_code()


@join_code_app.command()
@explained
def rotate(
    without: Annotated[list[str] | None, typer.Option(help="A node to shut out, by name or id.")] = None,
    url: Url = DEFAULT_URL,
) -> None:
    """Change the join code, and give it to all nodes that are here and stay."""
    from covey.cli import joining  # noqa: PLC0415 (the other commands start faster so)

    joining.rotate(url, without or [])


def draft_to_place(draft: str | None, url: str) -> str | None:
    """Named as a model is, if one is named. Raises `CliError`."""
    return None if draft is None else model_to_place(draft, url)


def warn_of_one_copy(state: ClusterState) -> None:
    """What only one disk holds, a broken disk takes along; a node that has no other knows that."""
    if len(state.members) > 1:
        err.print("This is noted on one node only: no second one was there to keep a copy.", style="dim")


def main() -> None:
    """The console script."""
    app()
