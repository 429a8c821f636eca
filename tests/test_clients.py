"""The page on clients, followed word for word at a real server."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_serving_sockets import command

PAGE = (Path(__file__).parent.parent / "docs" / "clients.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
CURL = [text for kind, text in BLOCKS if kind == "bash" and text.startswith("curl")]
PYTHON = [text for kind, text in BLOCKS if kind == "python"]
URL = "http://127.0.0.1:8000/v1"


@pytest.fixture(scope="module")
def url(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("clients")
    shutil.copytree(checkpoint, folder / "d18")
    arguments = [str(folder / "d18"), "--engine", "transformers"]
    with command(*arguments, log=folder / "log", OMP_NUM_THREADS="1") as (_, found):
        yield found


def run(arguments: list[str]) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OPENAI", "LANG"))}
    done = subprocess.run(
        arguments, capture_output=True, text=True, check=False, timeout=120, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_page_has_what_is_tried_here() -> None:
    assert (len(CURL), len(PYTHON)) == (3, 2)
    assert all(URL in text for text in (*CURL, *PYTHON))


@pytest.mark.skipif(not shutil.which("curl"), reason="no curl here")
def test_curl_is_answered(url: str) -> None:
    models, completion, stream = (run(["sh", "-c", text.replace(URL, url)]) for text in CURL)
    assert [card["id"] for card in json.loads(models)["data"]] == ["d18"]
    assert json.loads(completion)["usage"]["completion_tokens"] in range(1, 9)
    chunks = [line for line in stream.splitlines() if line]
    assert len(chunks) >= 2
    assert all(chunk.startswith("data: {") for chunk in chunks[:-1])
    assert chunks[-1] == "data: [DONE]"


def test_the_package_of_openai_is_answered(url: str) -> None:
    whole, streamed = run([sys.executable, "-c", PYTHON[0].replace(URL, url)]).split("\n", 1)
    assert whole
    assert streamed.strip()


def test_langchain_is_answered(url: str) -> None:
    check = """
from langchain_core.messages import HumanMessage
assert answer.content
assert answer.response_metadata["finish_reason"] == "length"
assert answer.usage_metadata["output_tokens"] == 8
assert "".join(p.content for p in model.stream("The")) == answer.content
scored = model.bind(logprobs=True).invoke([HumanMessage("größer 😀")])
assert len(scored.response_metadata["logprobs"]["content"]) == 8
print("as it should be")
"""
    text = PYTHON[1].replace(URL, url) + check
    assert run([sys.executable, "-c", text]).endswith("as it should be\n")
