"""``arskit serve``: checkpoints opened, an engine chosen for each, requests answered until told."""

from __future__ import annotations

import gc
import ipaddress
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import uvicorn

from ars_kit.causality import NotCausalError
from ars_kit.errors import ArsKitError, ConfigError, PluginError
from ars_kit.host import Host
from ars_kit.schema import Choice
from ars_kit.spec import Engine, Service
from ars_kit_serving.app import create_app
from ars_kit_serving.checkpoints import Checkpoint, open_checkpoint
from ars_kit_serving.connections import PatientProtocol
from ars_kit_serving.generation import Model
from ars_kit_serving.guard import LOCAL_HOSTS, Rules
from ars_kit_serving.logs import log_to_stderr
from ars_kit_serving.relaying import Relay, Relayed
from ars_kit_serving.scheduling import Scheduler
from ars_kit_serving.tokenizing import ServedTokenizer
from ars_kit_serving.vllm_home import find_python

AUTO = ("genai", "onnx", "transformers")
"""Engines that ``auto`` asks, in this order; the last one serves whatever can be served."""

VLLM_MEMORY = 0.9
"""Share of a GPU's memory that vLLM may take, of all models together."""

KEY = re.compile(r"[!-~]+")
ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/?#\sA-Z]+")
"""As browsers write it; ``*`` is every page, ``null`` one of a file."""


@dataclass(frozen=True, slots=True)
class Serving:
    """What to serve, how, and to whom.

    Attributes:
        names: members, ``best``, or directories.
        out: the run folder.
        host: the installed plugins.
        engine: an engine and its settings, or ``auto``.
        cache: folder for what engines derive from checkpoints.
        address: to listen on.
        port: to listen on; 0 for any free one.
        key: that clients must present.
        origins: web pages that may ask.
        context: tokens of prompt and answer; None for the model's own.
        slots: sequences a model works on at once.
        queue: sequences that may wait for a model.
        seconds: that a request may take.
        drain_seconds: that requests may go on once the server is told to stop.
        say: tells the user a line of progress.
        environment: variables of this process.
        gpu: whether there is a GPU for vLLM.
    """

    names: Sequence[str]
    out: Path
    host: Host
    engine: Choice
    cache: Path
    address: str
    port: int
    key: str | None
    origins: Collection[str]
    context: int | None
    slots: int
    queue: int
    seconds: float
    drain_seconds: float
    say: Callable[[str], None]
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    gpu: bool = False


def serve(serving: Serving, ready: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM, then finish what is being answered.

    Args:
        serving: what, how, and to whom.
        ready: called with the base URL once requests are answered.

    Raises:
        ConfigError: a checkpoint, an engine or the address cannot be had, or there is no key where
            others than this machine could ask.
        IntegrityError: a checkpoint is not what was committed.
        PluginError: the engine failed.
    """
    rules = rules_of(serving)
    checkpoints = [open_checkpoint(name, serving.out) for name in serving.names]
    _require_distinct([c.name for c in checkpoints])
    with _listening(serving.address, serving.port) as listener:
        models: dict[str, Model] = {}
        try:
            for checkpoint in checkpoints:
                models[checkpoint.name] = load(checkpoint, serving)
            gc.freeze()  # weights and modules stay: no collection need pause requests for them
            _run(serving, models, rules, listener, ready)
        finally:
            for model in models.values():
                model.scheduler.close()


def rules_of(serving: Serving) -> Rules:
    """Return who may ask.

    Raises:
        ConfigError: others than this machine could, without a key; or nobody could, since no
            request holds such a key, or no browser names such an origin.
    """
    local = is_loopback(serving.address)
    if serving.key and not KEY.fullmatch(serving.key):
        raise ConfigError(
            "the key of ARSKIT_API_KEY or --api-key has spaces, or letters that are not ASCII, "
            "which clients cannot send; choose another"
        )
    for origin in serving.origins:
        if not ORIGIN.fullmatch(origin):
            raise ConfigError(
                f"--cors-origin {origin} is no origin, which has a scheme, a host in lower case, "
                "perhaps a port, and no path, like https://app.example"
            )
    if not local and not serving.key:
        raise ConfigError(
            f"--host {serving.address} lets other machines ask: set a key with ARSKIT_API_KEY or "
            "--api-key, or leave --host out"
        )
    return Rules(
        key=serving.key or None,
        hosts=None if serving.key else LOCAL_HOSTS | {serving.address.lower()},
        origins=tuple(serving.origins),
    )


def is_loopback(address: str) -> bool:
    """Whether nobody but this machine can reach an address."""
    try:
        return address == "localhost" or ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def load(checkpoint: Checkpoint, serving: Serving) -> Model:
    """Load a checkpoint into its engine.

    Raises:
        ConfigError: no engine can serve it.
        PluginError: the engine failed.
    """
    tokenizer = ServedTokenizer(checkpoint.path)
    vocabulary = int(checkpoint.config.get_text_config().vocab_size)
    if tokenizer.size > vocabulary:
        raise ConfigError(
            f"{checkpoint.name}: its tokenizer has {tokenizer.size} tokens, its model only "
            f"{vocabulary}; they are not of one checkpoint"
        )
    service = Service(
        name=checkpoint.name,
        path=checkpoint.path,
        digest=checkpoint.digest,
        cache=serving.cache,
        context=serving.context,
        slots=serving.slots,
        say=serving.say,
        environment=serving.environment,
    )
    engine = choose(service, serving)
    return Model(
        name=checkpoint.name,
        tokenizer=tokenizer,
        scheduler=working(engine, serving),
        vocabulary=min(tokenizer.size, vocabulary),
        created=int(time.time()),
    )


def working(engine: Engine | Relayed, serving: Serving) -> Scheduler | Relay:
    """Return what works an engine: one that computes logits, or one that draws by itself.

    Raises:
        PluginError: it is neither.
    """
    if isinstance(engine, Relayed):
        return Relay(engine, queue=serving.queue)
    lacks = [name for name in ("prefill", "decode", "release") if not hasattr(engine, name)]
    if lacks:
        raise PluginError(
            f"engine {serving.engine} is a {type(engine).__name__}, which has no {', '.join(lacks)}"
        )
    return Scheduler(engine, queue=serving.queue)


def choose(service: Service, serving: Serving) -> Engine | Relayed:
    """Make the engine that was asked for, or with ``auto`` the first that serves this checkpoint.

    vLLM comes before all others where it is set up and there is a GPU. What one cannot run, or
    fails on, is left to the next.

    Raises:
        ConfigError: none does.
        PluginError: it failed; with ``auto`` the last one did.
    """
    if serving.engine.name != "auto":
        made: Engine | Relayed = serving.host.make("servers", serving.engine, service)
        serving.say(f"{service.name}: engine {serving.engine}, as asked for")
        return made
    reasons: list[str] = []
    if _has_vllm(serving):
        share = Choice("vllm", {"memory": round(VLLM_MEMORY / len(serving.names), 3)})
        try:
            made = serving.host.make("servers", share, service)
        except (ConfigError, PluginError) as error:
            reasons.append(f"vllm cannot: {error}")
        else:
            serving.say(f"{service.name}: engine vllm (it is set up, and there is a GPU)")
            return made
    for name in AUTO:
        try:
            made = serving.host.make("servers", Choice(name), service)
        except NotCausalError:  # so it is for every other engine
            raise
        except ArsKitError as error:  # a cache that is full or only read is no end either
            if name == AUTO[-1] and not isinstance(error, ConfigError):
                raise
            reasons.append(f"{name} cannot: {error}")
            continue
        why = "; ".join(reasons) or "the first choice of auto"
        serving.say(f"{service.name}: engine {name} ({why})")
        return made
    raise ConfigError(f"no engine serves {service.name}. {'; '.join(reasons)}")


def _has_vllm(serving: Serving) -> bool:
    """Whether ``auto`` takes vLLM: there is a GPU, and vLLM is found.

    An ``ARSKIT_VLLM_PYTHON`` that is no program is not found either, and said to whoever asks for
    vLLM by name.
    """
    if not serving.gpu:
        return False
    try:
        find_python(serving.environment)
    except ConfigError:
        return False
    return True


def _require_distinct(names: Sequence[str]) -> None:
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ConfigError(f"two of the models would be called {min(twice)!r}; rename one")


def _listening(address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        return socket.create_server((address, port), family=family, backlog=2048)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {address} port {port}: {error.strerror or error}; choose another "
            "--host or --port"
        ) from error


def _run(
    serving: Serving,
    models: dict[str, Model],
    rules: Rules,
    listener: socket.socket,
    ready: Callable[[str], None],
) -> None:
    log_to_stderr()
    app = create_app(models, rules=rules, seconds=serving.seconds)
    host = f"[{serving.address}]" if ":" in serving.address else serving.address
    url = f"http://{host}:{listener.getsockname()[1]}"

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            ready(url)

    config = uvicorn.Config(
        app,
        http=PatientProtocol,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=int(serving.drain_seconds),
    )
    server = Server(config)
    with _told_to_stop(server, serving.say):
        server.run(sockets=[listener])


@contextmanager
def _told_to_stop(server: uvicorn.Server, say: Callable[[str], None]) -> Iterator[None]:
    """Make the signals that uvicorn raises again after its orderly end mean nothing more.

    One that comes before uvicorn listens for them ends the server as it begins.
    """

    def done(number: int, _: FrameType | None) -> None:
        say(f"stopped by {signal.Signals(number).name}")
        server.should_exit = True

    before = {s: signal.signal(s, done) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        sys.stderr.flush()
