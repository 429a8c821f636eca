"""``arskit export`` and ``arskit serve``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from ars_kit.cli.members import expand, names_in_run
from ars_kit.cli.options import (
    Amount,
    cache_folder,
    clearing_up,
    echo_json,
    find_models,
    importing,
    json_option,
    make_host,
    out_option,
)


@click.command()
@click.argument("name", shell_complete=names_in_run)
@click.option(
    "--format",
    "form",
    default="onnx",
    show_default=True,
    help="onnx or genai, NAME or NAME:key=value.",
)
@click.option(
    "--into",
    type=click.Path(path_type=Path),
    show_default="NAME-FORMAT",
    help="Directory to write; must not exist.",
)
@click.option("--data", help="Text to compare on, where it is not the run's own.")
@out_option
@json_option
def export(
    name: str, form: str, into: Path | None, data: str | None, out: Path, as_json: bool
) -> None:
    """Export a member, 'best', or any model directory, and prove that it computes the same."""
    from itertools import islice

    from ars_kit.durable import byte_count
    from ars_kit.schema import parse_choice

    host, choice = make_host(), parse_choice(form)
    host.check("exporters", choice)
    find_models([name], out)

    with importing():
        from ars_kit.evaluating import heldout_text
        from ars_kit_serving.checkpoints import open_checkpoint
        from ars_kit_serving.export import Export, export_checkpoint
        from ars_kit_serving.parity import JUDGED

    checkpoint = open_checkpoint(name, out)
    overrides = {"data.source": data} if data else {}
    with clearing_up():
        windows = heldout_text(checkpoint.path, host, out, cache_folder(), overrides)
        texts = [window.tolist() for window in islice(windows, JUDGED)]
        target = into or Path(f"{checkpoint.name}-{choice.name}")
        facts = export_checkpoint(Export(checkpoint, host, choice, target, texts))
    if as_json:
        echo_json(facts)
        return
    size = byte_count(facts["bytes"])
    if "greedy" in facts:
        click.echo(
            f"{target}: {size}. Largest difference of a logit: {facts['largest_difference']:.3g}, "
            f"the largest logit being {facts['largest_logit']:.3g}; greedy text from "
            f"{facts['greedy']['equal']} of {facts['greedy']['prompts']} prompts is equal."
        )
    else:
        click.echo(
            f"{target}: {size}. Held-out loss {facts['loss']:.4f}, the model's "
            f"{facts['loss_of_the_model']:.4f}; the most likely token is the same at "
            f"{facts['agreement']:.1%} of {facts['compared']['tokens']} positions."
        )


@click.command()
@click.argument("names", nargs=-1, shell_complete=names_in_run)
@click.option(
    "--engine",
    default="auto",
    show_default=True,
    help="auto, or an engine, NAME or NAME:key=value.",
)
@click.option(
    "--host",
    "address",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on; any but this machine's own needs a key.",
)
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True)
@click.option("--api-key", envvar="ARSKIT_API_KEY", help="What clients must present as Bearer.")
@click.option("--cors-origin", "origins", multiple=True, help="Web page that may ask. Repeatable.")
@click.option("--context", type=click.IntRange(1), help="Tokens of prompt and answer, at most.")
@click.option(
    "--slots",
    type=click.IntRange(1, 256),
    default=8,
    show_default=True,
    help="Sequences a model works on at once.",
)
@click.option(
    "--queue",
    type=click.IntRange(0),
    default=128,
    show_default=True,
    help="Sequences that may wait for a model; more are told to come again.",
)
@click.option(
    "--deadline",
    "seconds",
    type=Amount(above=True),
    default=600.0,
    show_default=True,
    help="Seconds a request may take.",
)
@click.option(
    "--drain",
    "drain_seconds",
    type=click.IntRange(0),
    default=30,
    show_default=True,
    help="Seconds that requests may go on after SIGTERM.",
)
@click.option(
    "--setup-vllm",
    "setup",
    is_flag=True,
    help="First make an environment with vLLM, unless there is one; without NAMES, that alone.",
)
@out_option
def serve(
    names: tuple[str, ...],
    engine: str,
    api_key: str | None,
    setup: bool,
    **options: Any,
) -> None:
    """Serve members, d10..d18, 'best', or any model directory, as OpenAI's API."""
    from ars_kit_serving.vllm_home import has_gpu, set_up

    def say(line: str) -> None:
        click.echo(line, err=True)

    environment = dict(os.environ)
    gpu = has_gpu(environment)
    if setup:
        with clearing_up():
            python = set_up(environment, gpu=gpu, say=say)
        if not names:
            click.echo(python)
            return
    if not names:
        raise click.UsageError("Missing argument 'NAMES...'.", click.get_current_context())

    from ars_kit.schema import parse_choice

    host, choice, models = make_host(), parse_choice(engine), expand(names)
    if choice.name != "auto":
        host.listing("servers", choice.name)
    out: Path = options.pop("out")
    find_models(models, out)

    with importing():
        from ars_kit_serving.serve import Serving
        from ars_kit_serving.serve import serve as run

    serving = Serving(
        names=models,
        out=out,
        host=host,
        engine=choice,
        cache=cache_folder() / "engines",
        key=api_key,
        say=say,
        environment=environment,
        gpu=gpu,
        **options,
    )
    with clearing_up():
        run(serving, lambda url: click.echo(f"{url}/v1"))
