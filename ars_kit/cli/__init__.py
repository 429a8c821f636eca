"""The command line: options in, one call, print. The only room that reads the environment."""

from __future__ import annotations

import io
import logging
import os
import sys

import click

from ars_kit import __version__
from ars_kit.cli.growing import grow
from ars_kit.cli.installation import completion, config, doctor
from ars_kit.cli.members import evaluate, select, status, verify
from ars_kit.cli.options import Terminated
from ars_kit.cli.plugins import plugins as plugins_group
from ars_kit.cli.reporting import compare, lineage, report
from ars_kit.cli.serving import export, serve
from ars_kit.cli.training import plan, run
from ars_kit.errors import ArsKitError, ConfigError, DivergedError, Preempted


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="arskit")
def cli() -> None:
    """Train a family of language models, each inheriting its predecessor."""


for _command in (
    compare,
    completion,
    config,
    doctor,
    evaluate,
    export,
    grow,
    lineage,
    plan,
    plugins_group,
    report,
    run,
    select,
    serve,
    status,
    verify,
):
    cli.add_command(_command)


def main() -> None:
    """Run the command line; every handled error is one line and an exit code."""
    # Their progress bars and advice would drown ours; set before they are imported.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # transformers imports torchao where it is installed, which complains of what it lacks.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without Φ shows a question mark
    try:
        cli.main(prog_name="arskit", standalone_mode=False)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt) as error:
        click.echo("arskit: interrupted", err=True)
        sys.exit(143 if isinstance(error.__cause__, Terminated) else 130)
    except BrokenPipeError:
        sys.stderr.close()  # the reader went away; nothing is left to say to it
        sys.exit(1)
    except ArsKitError as error:
        if speaker := _speaker(error):
            click.echo(f"{speaker}: {error}", err=True)
        sys.exit(error.exit_code)


def _speaker(error: ArsKitError) -> str:
    """Return in whose name an error is said; empty where another process of the run says it."""
    rank, local = os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK", "0")
    if rank == "0":
        return "arskit"
    alike = isinstance(error, Preempted | DivergedError)
    once = alike or (isinstance(error, ConfigError) and local != "0")
    return "" if once else f"arskit (process {rank})"
