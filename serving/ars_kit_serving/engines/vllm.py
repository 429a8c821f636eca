"""vLLM as the engine: a process in an environment of its own, spoken to in token ids.

Prompts go there and tokens come back as ids; text, stop strings, limits and the form of answers are
the server's, as for every engine.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import urllib.request
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
from pydantic_core import from_json

from ars_kit.causality import require_causal
from ars_kit.errors import ConfigError, PluginError
from ars_kit.models import load_base_config
from ars_kit.spec import Service
from ars_kit.stored import stored_weights, streamed_model
from ars_kit_serving.engines.child import Child
from ars_kit_serving.engines.context import context_of
from ars_kit_serving.failures import ApiError, engine_dead
from ars_kit_serving.logs import LOGGER
from ars_kit_serving.sampling import COLDEST, Drawn
from ars_kit_serving.scheduling import Job, Step
from ars_kit_serving.vllm_home import ON_A_CPU, SERVER, find_python, has_gpu

if TYPE_CHECKING:
    from transformers import PretrainedConfig

OFFLINE = {
    "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1", "PYTHONSAFEPATH": "1",
}  # fmt: skip
KINDS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
FORMS = '{"backend": "guidance", "disable_any_whitespace": true}'
"""As :mod:`ars_kit_serving.constraints` has it: llguidance, and no spaces but where they belong."""
KEY = "ARSKIT_VLLM_KEY"
ID = "token_id:"
"""What vLLM writes before an id in log-probabilities."""


@dataclass(frozen=True, slots=True)
class VllmSettings:
    """How vLLM is run.

    Attributes:
        device: cpu or cuda; auto takes a GPU where the driver shows one.
        dtype: of weights and arithmetic; auto is fp32 on a CPU and bf16 elsewhere, as transformers
            has it here. vLLM's own auto would round fp32 weights to half of their bits.
        compiled: whether vLLM compiles the model before it answers.
        memory: share of a GPU's that it may take.
        port: that it listens on; 0 for a free one.
        seconds: that it may take to be ready.
    """

    device: str = "auto"
    dtype: str = "auto"
    compiled: bool = True
    memory: float = 0.9
    port: int = 0
    seconds: float = 600.0


class VllmEngine:
    """A vLLM server of one checkpoint on loopback, behind a key.

    Args:
        service: what to serve; ``ARSKIT_VLLM_KEY`` of its environment is the key, else it is one
            that nobody else has.
        how: it is run.

    Raises:
        ConfigError: vLLM is not found, a setting is wrong, the context is larger than the model's,
            or it is no causal language model.
        PluginError: it did not start, or cannot run the model.
    """

    def __init__(self, service: Service, how: VllmSettings) -> None:
        device, dtype, memory = how.device, how.dtype, how.memory
        if not hasattr(os, "killpg"):
            raise ConfigError("vLLM needs Linux or macOS; choose another --engine")
        if not 0 < memory <= 1:
            raise ConfigError(f"memory={memory} is no share; choose more than 0 and at most 1")
        config = load_base_config(str(service.path.absolute()))
        self.context, self.slots = context_of(config, service), service.slots
        port = how.port or _free_port()
        self._key = service.environment.get(KEY) or secrets.token_hex(16)
        self.url = f"http://127.0.0.1:{port}"
        python = find_python(service.environment)
        _require_causal(service.path, config)
        environment = {k: v for k, v in service.environment.items() if k != "PYTHONPATH"}
        if device == "auto":
            device = "cuda" if has_gpu(environment) else "cpu"
        if dtype == "auto":
            dtype = "fp32" if device == "cpu" else "bf16"
        if device == "cpu":
            environment = {**ON_A_CPU, **environment}
        command = [
            str(python), "-m", SERVER, "--model", str(service.path.absolute()),
            "--served-model-name", "served", "--host", "127.0.0.1", "--port", str(port),
            "--max-model-len", str(self.context), "--max-num-seqs", str(self.slots),
            "--dtype", KINDS[dtype], "--structured-outputs-config", FORMS,
            "--generation-config", "vllm", "--no-enable-log-requests",
            *([] if how.compiled else ["--enforce-eager"]),
            *([] if device == "cpu" else ["--gpu-memory-utilization", str(memory)]),
        ]  # fmt: skip
        log = (service.cache / f"vllm-{service.name}-{os.getpid()}.log").absolute()
        service.say(f"{service.name}: starting vLLM of {python}; its log is {log}")
        self.child = Child(
            "vLLM", command, {**environment, **OFFLINE, "VLLM_API_KEY": self._key}, log
        )
        self.child.wait_until_ready(f"{self.url}/health", how.seconds)
        self._try(how.seconds)
        self._session: aiohttp.ClientSession | None = None

    def _try(self, seconds: float) -> None:
        """Have one token drawn: vLLM finds out no sooner whether it has kernels for a model.

        Raises:
            PluginError: it has not.
        """
        body = {"model": "served", "prompt": [0], "max_tokens": 1, "stop_token_ids": []}
        request = urllib.request.Request(  # noqa: S310 -- http to loopback
            f"{self.url}/v1/completions",
            json.dumps(body).encode(),
            {"content-type": "application/json", "authorization": f"Bearer {self._key}"},
        )
        try:
            urllib.request.urlopen(request, timeout=seconds).close()  # noqa: S310 -- likewise
        except OSError as error:
            self.child.stop()
            raise PluginError(
                f"vLLM cannot run this model: {self.child.reason()}. Its log is {self.child.log}"
            ) from error

    def complaint(self) -> str | None:
        """Return why nothing can be answered any more, or None."""
        return self.child.complaint()

    async def steps(self, job: Job) -> AsyncGenerator[Sequence[Step], None]:
        """Yield a sequence's tokens as they come; closing it makes vLLM drop the sequence.

        Raises:
            ApiError: vLLM has ended.
            RuntimeError: it refused, or failed on this sequence.
        """
        if self._session is None:
            self._session = aiohttp.ClientSession(
                self.url,
                headers={"authorization": f"Bearer {self._key}"},
                timeout=aiohttp.ClientTimeout(total=None),
                connector=aiohttp.TCPConnector(limit=0),
            )
        ended = False
        try:
            async with self._session.post("/v1/completions", json=body_of(job)) as answer:
                if answer.status != 200:
                    raise RuntimeError(f"vLLM: {(await answer.text())[:1000]}")
                rest = b""
                async for part in answer.content.iter_any():
                    if ended:  # what is left is read, so that the connection can be used again
                        continue
                    *lines, rest = (rest + part).split(b"\n")
                    made = [step for line in lines for step in _read(line, job)]
                    if made:
                        yield made
                        ended = made[-1].finish is not None
        except aiohttp.ClientError as error:
            if not ended:
                raise self._dead() from error
        if not ended:
            raise self._dead()

    def _dead(self) -> ApiError:
        end = self.child.complaint() or f"vLLM broke off. Its log is {self.child.log}"
        LOGGER.error("an engine has ended", extra={"facts": {"reason": end}})
        return engine_dead()

    async def disconnect(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()

    def close(self) -> None:
        """Stop vLLM."""
        self.child.stop()


def _require_causal(path: Path, config: PretrainedConfig) -> None:
    """Refuse a model that reads ahead, with one of its modules in memory at a time.

    What cannot be opened so, such as weights in a form that vLLM alone knows, is left to vLLM.

    Raises:
        NotCausalError: it does.
    """
    try:
        model = streamed_model(config, stored_weights(path, config))
    except Exception:  # noqa: BLE001 -- whatever transformers cannot make of it
        return
    require_causal(str(path), model)


def body_of(job: Job) -> dict[str, Any]:
    """Return what vLLM is asked: one sequence, in token ids both ways."""
    how = job.sampler.how
    body: dict[str, Any] = {
        "model": "served",
        "prompt": list(job.prompt),
        "max_tokens": job.limit,
        "temperature": how.temperature,
        "top_p": max(how.top_p, COLDEST),  # it takes no 0
        "presence_penalty": how.presence_penalty,
        "frequency_penalty": how.frequency_penalty,
        "stop_token_ids": sorted(job.ends),
        "stream": True,
        "return_token_ids": True,
    }
    if how.logit_bias:
        body["logit_bias"] = {str(token): bias for token, bias in how.logit_bias.items()}
    if how.seed is not None:
        body["seed"] = (how.seed + job.sampler.choice) % 2**63
    if job.sampler.constraint is not None:
        body["structured_outputs"] = {"json": dict(job.sampler.constraint.schema)}
    if how.logprobs is not None:
        body |= {"logprobs": how.logprobs, "return_tokens_as_token_ids": True}
    return body


def _read(line: bytes, job: Job) -> list[Step]:
    """Return the tokens of a line of the stream; most lines are events or empty."""
    return steps_of(from_json(line[6:]), job) if line.startswith(b"data: {") else []


def steps_of(chunk: Mapping[str, Any], job: Job) -> list[Step]:
    """Return the tokens of one chunk.

    vLLM has ends of its own beside those that it is told, from the model's configurations, and
    hands out the token that ended a text with the others. Some of its versions call the last token
    that a text may have ``length`` where it is an end.

    Raises:
        RuntimeError: the chunk is an error.
    """
    if "error" in chunk:
        raise RuntimeError(f"vLLM: {chunk['error']}")
    if not chunk["choices"]:
        return []
    choice = chunk["choices"][0]
    drawn = _drawn(choice, job)
    reason = choice["finish_reason"]
    if reason is None:
        return [Step(d) for d in drawn]
    if reason not in {"stop", "length"}:
        raise RuntimeError(f"vLLM gave up: {reason}")
    if not drawn:  # the token that ended the text was kept back
        return [Step(Drawn(min(job.ends)), "stop")]
    ended = reason == "stop" or drawn[-1].token in job.ends
    return [*(Step(d) for d in drawn[:-1]), Step(drawn[-1], "stop" if ended else "length")]


def _drawn(choice: Mapping[str, Any], job: Job) -> list[Drawn]:
    tokens, told = choice.get("token_ids") or [], choice.get("logprobs")
    most = job.sampler.how.logprobs or 0
    if not told:
        return [Drawn(token) for token in tokens]
    rows = zip(tokens, told["token_logprobs"], told["top_logprobs"], strict=True)
    return [Drawn(token, logprob, _top(row or {}, most)) for token, logprob, row in rows]


def _top(row: Mapping[str, float], most: int) -> tuple[tuple[int, float], ...]:
    """Return the most likely ids, best first; vLLM adds the one that was drawn."""
    pairs = [(int(token.removeprefix(ID)), logprob) for token, logprob in row.items()]
    return tuple(sorted(pairs, key=lambda pair: -pair[1])[:most])


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
