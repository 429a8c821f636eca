"""Whether a checkpoint is a causal language model, and not only of a type that can be one.

transformers loads many an encoder as ``AutoModelForCausalLM``: what it then computes is no
prediction of a next token.
"""

from __future__ import annotations

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from ars_kit.errors import ConfigError

READ, AHEAD = 4, 4
"""Tokens whose predictions are compared, and those after them that are changed."""

BOUND = 1e-4
"""By which a logit may change, against the largest: mixtures of experts round by the batch."""

_OTHER_TASKS = (
    modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_NEXT_SENTENCE_PREDICTION_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)


class NotCausalError(ConfigError):
    """A checkpoint is no causal language model, whatever engine would run it. Exit code 3."""


def other_task(config: PretrainedConfig) -> str | None:
    """Return what else than a causal language model a configuration says it is, if it does.

    A bare trunk (``GPT2Model``) is none: with tied embeddings it has all that a decoder has.
    """
    if getattr(config, "is_encoder_decoder", False):
        return "an encoder-decoder"
    causal = set(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    others = {name for names in _OTHER_TASKS for name in names.values()} - causal
    named = getattr(config, "architectures", None) or []
    if named and all(name in others for name in named):
        return f"a {named[0]}"
    return None


@torch.no_grad()
def reads_ahead(model: PreTrainedModel) -> bool:
    """Whether what a model predicts after a text changes with the tokens that follow it.

    Args:
        model: in eval mode; its weights may be fetched as they are needed. One that cannot compute
            where it is now is not judged.
    """
    size = int(model.config.get_text_config().vocab_size)
    device = torch.device("cpu") if model.device.type == "meta" else model.device
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(size, (1, READ + AHEAD), generator=draw)
    others = tokens.clone()
    others[:, READ:] = (tokens[:, READ:] + 1) % size
    try:
        both = torch.cat([tokens, others]).to(device)  # at once: weights may come from a disk
        before, after = model(input_ids=both, use_cache=False).logits[:, :READ].float()
    except Exception:  # noqa: BLE001 -- a kernel that this device lacks, a type of its own
        return False
    bound = max(BOUND, 16 * torch.finfo(model.dtype).eps) * before.abs().max()
    return bool((after - before).abs().max() > bound)


def require_causal(name: str, model: PreTrainedModel) -> None:
    """Refuse a model that reads ahead.

    Raises:
        NotCausalError: it does.
    """
    if not reads_ahead(model):
        return
    mend = "use a decoder"
    if getattr(model.config, "is_decoder", None) is False:
        mend += ', or set "is_decoder": true in its config.json if it was trained as one'
    raise NotCausalError(
        f"base {name!r} is no causal language model: what it predicts changes with the tokens that "
        f"come later, as a {model.config.model_type} does that reads both ways; {mend}"
    )
