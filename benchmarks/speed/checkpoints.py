"""Checkpoints whose greedy text is printable and never ends by itself.

Speed does not depend on what a model has learned. It does depend on when it stops, and on how text
is cut into chunks: so the rows of the output matrix of end-of-text and of bytes that are no text by
themselves are zero, and the most likely token is never one of them. Training leaves it at that, for
its text holds none of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

from ars_kit.tokenizer import TrainBPE, load_pretrained, make_tokenizer

TEXTS = [text for _, text in sorted(topics.items()) if text.isascii()]
"""Python's manual, as every installation of Python has it."""
HELD_OUT = 0.2
"""Share of its tokens, at the end, that no step of training sees."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A Qwen2 to be written.

    Attributes:
        layers: of the decoder.
        width: of the residual stream.
        heads: of attention; half as many for keys and values.
        inner: width of the MLP.
        vocabulary: of the tokenizer, trained on Python's manual.
        context: tokens.
    """

    layers: int
    width: int
    heads: int
    inner: int
    vocabulary: int
    context: int = 512


SHAPES = {
    "tiny": Shape(2, 32, 2, 48, 320, 128),
    "2M": Shape(10, 128, 4, 344, 1024),
    "55M": Shape(18, 512, 8, 1408, 2048),
}


def write_checkpoint(shape: Shape, path: Path, spread: float = 0.1) -> int:
    """Write a directory as transformers does; returns the number of parameters.

    Args:
        shape: of the model.
        path: to write.
        spread: standard deviation of the weights; 0.02, as transformers has it, is what learns,
            but before it has, the same tokens follow whatever stands before them.
    """
    made = make_tokenizer(TrainBPE(shape.vocabulary), iter(TEXTS), path)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        Qwen2Config(
            vocab_size=made.size,
            hidden_size=shape.width,
            intermediate_size=shape.inner,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads // 2,
            max_position_embeddings=shape.context,
            initializer_range=spread,
            bos_token_id=made.end,
            eos_token_id=made.end,
            tie_word_embeddings=False,
        )
    )
    tokenizer = load_pretrained(str(path))
    with torch.no_grad():
        for token in range(made.size):
            text = tokenizer.decode([token])
            if token == made.end or not (text.isascii() and text.isprintable()):
                model.get_output_embeddings().weight[token] = 0
    model.generation_config.pad_token_id = made.end
    model.save_pretrained(path)
    return sum(p.numel() for p in model.parameters())


def tokens_of(checkpoint: Path) -> tuple[list[int], list[int]]:
    """Return the manual's tokens, cut into what is trained on and what is held out."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids: list[int] = tokenizer("\n".join(TEXTS))["input_ids"]
    cut = int(len(ids) * (1 - HELD_OUT))
    return ids[:cut], ids[cut:]


def train(checkpoint: Path, ids: list[int], steps: int) -> None:
    """Train a checkpoint in its place, by AdamW at 1e-3 on 8 x 64 tokens a step."""
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    stream, draw = torch.tensor(ids), torch.Generator().manual_seed(0)
    for _ in range(steps):
        starts = torch.randint(len(ids) - 64, (8,), generator=draw).tolist()
        batch = torch.stack([stream[s : s + 64] for s in starts])
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(checkpoint)


def prompts(count: int, letters: int) -> list[str]:
    """Return texts that begin at different places of the manual."""
    whole = " ".join(" ".join(TEXTS).split())
    starts = [n * 997 % (len(whole) - letters) for n in range(count)]
    return [whole[start : start + letters] for start in starts]
