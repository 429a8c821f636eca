"""Engines that run an export: made once for each checkpoint, compared with it, and kept."""

from __future__ import annotations

import contextlib

import numpy as np

from ars_kit.causality import NotCausalError
from ars_kit.durable import check_directory, discard
from ars_kit.errors import ConfigError, ParityError
from ars_kit.models import load_base_config
from ars_kit.spec import Engine, Exporter, Service
from ars_kit_serving.engines.context import context_of
from ars_kit_serving.export import write_compared
from ars_kit_serving.kept import Failures, TransientError, clear_unused, is_transient, path_of

PROBES, PROBE = 4, 64
"""Sequences of tokens, drawn at random, on which every logit is compared, and their length."""


def derived_engine(service: Service, exporter: Exporter, form: str) -> Engine:
    """Open a service's export, made now if it was not before.

    Exports that nobody opened for a month are removed on the way.

    Args:
        service: what to serve.
        exporter: of the format.
        form: its name and settings.

    Raises:
        ConfigError: the checkpoint cannot be exported, or computes something else when it is; or
            that was found before, and is remembered.
        TransientError: there was too little memory, or disk, which is not remembered.
    """
    config = load_base_config(str(service.path.absolute()))
    context = context_of(config, service)
    target = path_of(service, form)
    if target.is_dir() and check_directory(target):
        service.say(f"{service.name}: its {form} export in the cache is damaged; made anew")
        with contextlib.suppress(FileNotFoundError):  # another server was quicker
            discard(target, scratch=service.cache)
    if not target.is_dir():
        failures = Failures(target)
        failures.raise_known()
        service.say(f"{service.name}: exporting to {form}; this is done once")
        texts = None  # what is rounded is judged on text like that which the model has learned
        if exporter.tolerance is not None:
            size = int(config.get_text_config().vocab_size)
            texts = np.random.default_rng(0).integers(0, size, (PROBES, PROBE)).tolist()
        facts = {"format": form, "source": service.name, "source_sha256": service.digest}
        try:
            write_compared(exporter, service.path, target, texts, facts)
        except ParityError as error:
            reason = f"its export does not compute the same: {error}"
            failures.remember(reason)
            raise ConfigError(reason) from error
        except MemoryError as error:
            raise TransientError(f"there was too little memory to export to {form}") from error
        except OSError:  # another server may have made it meanwhile, and it appears whole
            if not target.is_dir():
                raise
        except ConfigError as error:
            if not is_transient(error) and not isinstance(error, NotCausalError):
                failures.remember(str(error))
            raise
    clear_unused(service, in_use=target)
    return exporter.open(target, context=context, slots=service.slots)
