"""The models that `patch` serves, a row each, and what some of them need."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from embedkern.ops.attention import relative_bias_from_buckets

from .interface import attention_forward


class Pooled(NamedTuple):
    """An encoder's own pooling, which a packed call has to do again on the padded result."""

    reads: Callable[[Any, dict[str, Any], Tensor], Tensor]  # encoder, a call, mask (B, L) → position (B,)
    pool: Callable[[Any, Tensor, Tensor], Tensor]  # encoder, hidden (B, L, C), position (B,) → (B, C)


@dataclass(frozen=True)
class Family:
    """What has to be known to run a model's forward on packed tokens."""

    # What it gives a batch without position_ids: "count" every column, "ids" as RoBERTa; None takes no position_ids.
    positions: str | None = "count"
    pooled: Pooled | None = None
    # Replaces methods of its modules: yields (module, method's name, function of module and arguments).
    adapt: Callable[[nn.Module], Iterator[tuple[nn.Module, str, Callable[..., Any]]]] | None = None
    relative: bool = False  # attention depends on distances between indices, which a hole in the mask changes
    decoder: bool = False
    tokens: bool = True  # images have no padding to leave out
    hands_on: bool = True  # hands keyword arguments down to its attention


def attention_modules(encoder: nn.Module) -> list[nn.Module]:
    """The layers' attention modules in order: those that ask for an attention interface, or that an adapter serves."""

    def asks(module: nn.Module) -> bool:
        code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
        return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names

    return [m for m in encoder.modules() if asks(m) or type(m).__name__ == "MPNetSelfAttention"]


# ---------------------------------------------------------------------------------------------------------------------
# Pooling


def _first(encoder: Any, call: dict[str, Any], mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape[0], dtype=torch.long, device=mask.device)


def _last(encoder: Any, call: dict[str, Any], mask: Tensor) -> Tensor:
    return torch.full((mask.shape[0],), mask.shape[1] - 1, device=mask.device)


def _end_of_text(encoder: Any, call: dict[str, Any], mask: Tensor) -> Tensor:
    """CLIP's first end-of-text token; its first configurations say 2 and mean the largest id."""
    ids = call["input_ids"]
    return (ids if encoder.eos_token_id == 2 else (ids == encoder.eos_token_id).int()).argmax(1)


def _pool_first(encoder: Any, hidden: Tensor, position: Tensor) -> Tensor:
    activation = getattr(encoder, "pooler_activation", None)
    if activation is None:
        return encoder.pooler(hidden)
    return activation(encoder.pooler(hidden[:, 0]))  # ALBERT's pooler is a bare linear layer


def _pool_position(encoder: Any, hidden: Tensor, position: Tensor) -> Tensor:
    pooled = hidden[torch.arange(len(hidden), device=hidden.device), position]
    return encoder.head(pooled) if hasattr(encoder, "head") else pooled


FIRST = Pooled(_first, _pool_first)

# ---------------------------------------------------------------------------------------------------------------------
# Adapters


def _t5(encoder: nn.Module) -> Iterator[tuple[nn.Module, str, Callable[..., Any]]]:
    for module in encoder.modules():
        if hasattr(module, "compute_bias") and getattr(module, "has_relative_attention_bias", False):
            yield module, "compute_bias", _t5_bias


def _t5_bias(module: Any, *args: Any, **kwargs: Any) -> Tensor:
    """(H, 2R + 1) in place of (1, H, Lq, Lk): layers hand it on as they do theirs, and `attention_forward` takes it."""
    return relative_bias_from_buckets(
        module.relative_attention_bias.weight,
        module.relative_attention_num_buckets,
        module.relative_attention_max_distance,
        bidirectional=not module.is_decoder,
    )


def _mpnet(encoder: nn.Module) -> Iterator[tuple[nn.Module, str, Callable[..., Any]]]:
    for module in encoder.modules():
        if type(module).__name__ == "MPNetEncoder":
            yield module, "compute_position_bias", _mpnet_bias
        elif type(module).__name__ == "MPNetSelfAttention":
            yield module, "forward", _mpnet_attention


def _mpnet_bias(module: Any, hidden: Tensor, position_ids: Tensor | None = None, num_buckets: int = 32) -> Tensor:
    return relative_bias_from_buckets(module.relative_attention_bias.weight[:num_buckets], num_buckets, 128)


def _mpnet_attention(
    module: Any,
    hidden: Tensor,
    attention_mask: Any = None,
    position_bias: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    q, k, v = (
        project(hidden).unflatten(-1, (-1, module.attention_head_size)).transpose(1, 2)
        for project in (module.q, module.k, module.v)
    )
    out, weights = attention_forward(
        module,
        q,
        k,
        v,
        attention_mask,
        dropout=module.dropout.p if module.training else 0.0,
        is_causal=False,
        position_bias=position_bias,
        output_attentions=(wanted := bool(args[0] if args else kwargs.get("output_attentions"))),
    )
    return (module.o(out.flatten(2)), weights) if wanted else (module.o(out.flatten(2)),)


def _text_tower(encoder: Any) -> Iterator[tuple[nn.Module, str, Callable[..., Any]]]:
    yield encoder.embeddings, "forward", _text_embeddings


def _text_embeddings(module: Any, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
    """Without position_ids as ever; with them, packed input may be longer than the table of positions."""
    if position_ids is None:
        return type(module).forward(module, input_ids=input_ids)
    return module.token_embedding(input_ids) + module.position_embedding(position_ids)


# ---------------------------------------------------------------------------------------------------------------------
# The table. Names, because importing the classes would load every family's module.

ENCODER = Family(pooled=FIRST)
ROBERTA = Family("ids", FIRST)
DECODER = Family(decoder=True)
IMAGES = Family(tokens=False)
T5 = Family(None, adapt=_t5, relative=True)

FAMILIES = {
    f"transformers.models.{module}.modeling_{module}.{name}": family
    for module, name, family in (
        ("albert", "AlbertModel", ENCODER),
        ("bert", "BertModel", ENCODER),
        ("camembert", "CamembertModel", ROBERTA),
        ("clip", "CLIPTextModel", Family(pooled=Pooled(_end_of_text, _pool_position), adapt=_text_tower)),
        ("clip", "CLIPVisionModel", IMAGES),
        ("distilbert", "DistilBertModel", ENCODER),
        ("electra", "ElectraModel", ENCODER),
        ("gemma3", "Gemma3TextModel", DECODER),
        ("gte", "GteModel", ENCODER),
        ("llama", "LlamaModel", DECODER),
        ("mistral", "MistralModel", DECODER),
        ("modernbert", "ModernBertModel", ENCODER),
        ("mpnet", "MPNetModel", Family("ids", FIRST, _mpnet, relative=True, hands_on=False)),
        ("mt5", "MT5Stack", T5),
        ("nomic_bert", "NomicBertModel", ENCODER),
        ("phi3", "Phi3Model", DECODER),
        ("qwen2", "Qwen2Model", DECODER),
        ("qwen3", "Qwen3Model", DECODER),
        ("roberta", "RobertaModel", ROBERTA),
        ("siglip", "SiglipTextModel", Family(pooled=Pooled(_last, _pool_position), adapt=_text_tower, hands_on=False)),
        ("siglip", "SiglipVisionModel", IMAGES),
        ("t5", "T5Stack", T5),
        ("umt5", "UMT5Stack", T5),
        ("vit", "ViTModel", IMAGES),
        ("xlm_roberta", "XLMRobertaModel", ROBERTA),
    )
}
# transformers' models on top of an encoder that treat each position alone. The others may read the first one.
POSITIONWISE = ("EncoderModel", "ForCausalLM", "ForMaskedLM", "ForTokenClassification")


def family_of(model: PreTrainedModel) -> Family | None:
    # A subclass counts (FSDP makes one) unless it has its own forward, about which nothing is known.
    for base in type(model).__mro__:
        family = FAMILIES.get(f"{base.__module__}.{base.__qualname__}")
        if family is not None and type(model).forward is vars(base)["forward"]:
            return family
    return None


def reads_first(head: PreTrainedModel) -> bool:
    base = next((base for base in type(head).__mro__ if base.__module__.startswith("transformers.models.")), None)
    own = base is None or type(head).forward is not base.forward  # type: ignore[attr-defined]
    return own or not base.__name__.endswith(POSITIONWISE)  # type: ignore[union-attr]
