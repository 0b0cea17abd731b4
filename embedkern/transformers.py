"""Serving Hugging Face transformers models: the attention interface, and `patch` for whole models.

Importing this module registers `attn_implementation="embedkern"`. `patch` switches a loaded model to it and, with
`unpad`, runs the model's encoder on packed tokens: rows of a padded batch (B, L) laid end to end as one row (1, T),
with `cu_seq_lens_q` telling the attention where each sequence begins. Those are transformers' own names for packed
input, so input that arrives already packed takes the same path.
"""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import bidirectional_mask_function, sdpa_mask
from transformers.utils import logging

from embedkern.ops.attention import attention, attention_varlen

__all__ = ["attention_forward", "make_mask", "patch", "patched", "unpatch"]

NAME = "embedkern"
# What transformers 5.23's models pass to the interface beyond the arguments that `attention_forward` serves.
VARIANTS = ("position_bias", "s_aux", "sinks", "cache", "indices", "block_indices")
logger = logging.get_logger(__name__)
M = TypeVar("M", bound=nn.Module)

# ---------------------------------------------------------------------------------------------------------------------
# attn_implementation="embedkern"


def make_mask(*, mask_function: Callable[..., Any], attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
    """transformers' mask interface: a key mask (B, Lk) for padding alone, else what sdpa gets, bool (B, 1, Lq, Lk).

    Only `bidirectional_mask_function` itself is padding alone. Every other function, a causal one included, is
    expanded and never skipped, so that a missing mask always means "no mask".
    """
    if mask_function is not bidirectional_mask_function:
        kwargs.update(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
        return sdpa_mask(mask_function=mask_function, attention_mask=attention_mask, **kwargs)
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2:
        raise ValueError(f"attention_mask: got {attention_mask.ndim} dims, want (B, L) or a complete (B, H, Lq, Lk)")
    start, length = kwargs.get("kv_offset", 0), kwargs["kv_length"]
    key_mask = attention_mask[:, start : start + length]
    # Keys that a static cache holds beyond the mask aren't there yet.
    return F.pad(key_mask, (0, length - key_mask.shape[1])) if key_mask.shape[1] < length else key_mask


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    softcap: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query (B, Hq, Lq, D), key and value (B, Hkv, Lk, ·) → (B, Lq, Hq, Dv), None.

    attention_mask is a bool key mask (B, Lk), a bool mask or an additive float mask (B, 1 or Hq, Lq, Lk), or None.
    With `cu_seq_lens_q` the input is packed: B is 1 and attention stays inside each sequence. The weights are never
    made: `output_attentions` gets None in their place.

    Raises:
        NotImplementedError: for arguments of other variants (`position_bias`, `s_aux`, a paged `cache`, …), for
            a `sliding_window` or causal attention with 1 < Lq != Lk that come without a mask.
        ValueError: packed input with B > 1, with a padding mask, or with keys that cu_seq_lens_k doesn't describe.
    """
    # sliding_window repeats what the mask says, where there is one.
    for name in VARIANTS if attention_mask is not None else (*VARIANTS, "sliding_window"):
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"attn_implementation='{NAME}' doesn't take `{name}` ({type(module).__name__})")
    if kwargs.get("output_attentions"):
        logger.warning_once(
            f"`{NAME}` attention never forms the attention weights: `output_attentions=True` gives None for them. "
            "Use attn_implementation='eager' to see them."
        )
    if is_causal is None:
        # A decoder's layers keep is_causal=True when config.is_causal=False makes its mask bidirectional.
        config = getattr(module, "config", None)
        is_causal = getattr(module, "is_causal", True) and getattr(config, "is_causal", True)
    causal = bool(is_causal) and attention_mask is None
    if causal and cu_seq_lens_q is None and 1 < query.shape[2] != key.shape[2]:
        # sdpa aligns the diagonal to the first key, flash attention and this op to the last.
        raise NotImplementedError(f"causal, {query.shape[2]} queries, {key.shape[2]} keys and no mask to align them")
    options: dict[str, Any] = {
        "scale": query.shape[-1] ** -0.5 if scaling is None else scaling,
        "causal": causal,
        "softcap": softcap,
        "dropout_p": dropout,
    }
    width = value.shape[-1]
    query, key, value = _pad_head_dim(query), _pad_head_dim(key), _pad_head_dim(value)

    if cu_seq_lens_q is not None and (attention_mask is None or attention_mask.ndim == 2):
        _check_packed(query, key, attention_mask, cu_seq_lens_k)
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (1, H, T, D) → (T, H, D), no copy
        out: Any = attention_varlen(
            query,
            key,
            value,
            cu_seq_lens_q,
            cu_seq_lens_k,
            max_seqlen_q=max_length_q,
            max_seqlen_k=max_length_k,
            **options,
        )
        return out[None, ..., :width], None

    if cu_seq_lens_q is not None and attention_mask is not None:
        attention_mask = _within_sequences(attention_mask, query, key, cu_seq_lens_q, cu_seq_lens_k)
    if attention_mask is None:
        masks: dict[str, Any] = {}
    elif attention_mask.ndim == 2:
        masks = {"key_mask": attention_mask}
    else:
        masks = {"mask" if attention_mask.dtype == torch.bool else "bias": attention_mask}
    out = attention(query, key, value, **masks, **options)
    return out.transpose(1, 2)[..., :width], None


def _pad_head_dim(x: Tensor) -> Tensor:
    """Zeros up to the op's next head dim, a multiple of 8: they change neither scores nor the output's first dims."""
    missing = -x.shape[-1] % 8
    return F.pad(x, (0, missing)) if missing else x


def _check_packed(query: Tensor, key: Tensor, mask: Tensor | None, cu_seq_lens_k: Tensor | None) -> None:
    if query.shape[0] != 1:
        raise ValueError(f"cu_seq_lens_q: packed input has a batch of 1, got {query.shape[0]}")
    if mask is not None:
        raise ValueError("attention_mask: packed input (cu_seq_lens_q) has no padding, so it takes no padding mask")
    if cu_seq_lens_k is None and key.shape[2] != query.shape[2]:
        raise ValueError(
            f"cu_seq_lens_k: {key.shape[2]} keys for {query.shape[2]} queries (a cache or cross-attention) need it"
        )


def _within_sequences(mask: Tensor, query: Tensor, key: Tensor, cu_q: Tensor, cu_k: Tensor | None) -> Tensor:
    """A complete mask (…, Tq, Tk) over packed tokens, confined to pairs of the same sequence."""

    def sequence_ids(cu: Tensor, length: int) -> Tensor:
        return torch.searchsorted(cu[1:], torch.arange(length, dtype=cu.dtype, device=cu.device), right=True)

    same = sequence_ids(cu_q, query.shape[2])[:, None] == sequence_ids(cu_q if cu_k is None else cu_k, key.shape[2])
    return mask & same if mask.dtype == torch.bool else mask.masked_fill(~same, -torch.inf)


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, make_mask)

# ---------------------------------------------------------------------------------------------------------------------
# patch

# Encoders that run packed as they are: learned absolute positions, bidirectional attention through the interface, and
# nothing else that looks across tokens. Names, because importing the classes would load every family's module.
SERVED = frozenset(
    f"transformers.models.{module}.modeling_{module}.{name}Model"
    for module, name in (
        ("albert", "Albert"),
        ("bert", "Bert"),
        ("camembert", "Camembert"),
        ("distilbert", "DistilBert"),
        ("electra", "Electra"),
        ("roberta", "Roberta"),
        ("xlm_roberta", "XLMRoberta"),
    )
)
# Arguments of a call that don't index tokens, and those that do and are packed with them.
PASSED = frozenset({"output_attentions", "output_hidden_states", "return_dict", "use_cache", "num_items_in_batch"})
PACKED = ("input_ids", "inputs_embeds", "token_type_ids", "position_ids")


_live: weakref.WeakSet[_Patch] = weakref.WeakSet()


@dataclass
class _PackedBatch:
    """The arguments of a packed call, and the way back to the padded layout."""

    inputs: dict[str, Any]
    indices: Tensor  # (T,) where each packed token stands in the flattened (B·L)
    shape: tuple[int, int]  # B, L

    def pad(self, x: Tensor) -> Tensor:
        """(1, T, C) → (B, L, C), zeros at padding."""
        rows, length = self.shape
        padded = x.new_zeros(rows * length, x.shape[-1])
        return padded.index_copy(0, self.indices, x[0]).view(rows, length, -1)


class _Patch:
    """What `patch` did to one encoder; with `unpad`, also the encoder's `forward`.

    A plain object, not a module, so the encoder's state dict doesn't change. As an attribute that refers to its
    encoder, rather than a closure over it, it follows the encoder through `copy.deepcopy` and pickling.
    """

    def __init__(self, encoder: PreTrainedModel, reads_first_token: bool) -> None:
        self.encoder: Any = encoder
        self.reads_first_token = reads_first_token
        self.own_forward = vars(encoder).get("forward")
        configs: dict[int, Any] = {id(m.config): m.config for m in encoder.modules() if hasattr(m, "config")}
        # Models may share a config object: the first patch knows what to restore, the last one restores it.
        known: dict[int, str | None] = {id(config): name for patch in _live for config, name in patch.configs}
        self.configs: list[tuple[Any, str | None]] = [
            (c, known.get(i, c._attn_implementation)) for i, c in configs.items()
        ]

    def install(self, unpad: bool) -> None:
        vars(self.encoder)["_embedkern_patch"] = self
        if unpad:
            vars(self.encoder)["forward"] = self
        for config, _ in self.configs:
            config._attn_implementation = NAME
        _live.add(self)

    def remove(self) -> None:
        _live.discard(self)
        in_use = {id(config) for patch in _live for config, _ in patch.configs}
        for config, name in self.configs:
            if id(config) not in in_use:
                config._attn_implementation = name
        state = vars(self.encoder)
        del state["_embedkern_patch"]
        # Somebody (accelerate's autocast) may have wrapped `forward` since: their wrapper stays and finds us inactive.
        forward = state.get("forward")
        if self in (forward, getattr(forward, "__func__", None)):
            if self.own_forward is None:
                del state["forward"]
            else:
                state["forward"] = self.own_forward

    @property
    def active(self) -> bool:
        # The implementation may have been changed under the patch: cu_seq_lens_q would mean nothing to eager or sdpa.
        return vars(self.encoder).get("_embedkern_patch") is self and all(
            config._attn_implementation == NAME for config, _ in self.configs
        )

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        # `inspect.signature` follows this: trainers and sentence-transformers pick their inputs by forward's names.
        return self.own_forward or type(self.encoder).forward.__get__(self.encoder)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = self.__wrapped__
        if args and args[0] is self.encoder:  # accelerate's unwrap_model makes a bound method of us
            args = args[1:]
        if not self.active:
            return forward(*args, **kwargs)
        if args:
            kwargs = inspect.signature(type(self.encoder).forward).bind(self.encoder, *args, **kwargs).arguments
            kwargs.pop("self")
            kwargs.update(kwargs.pop("kwargs", {}))
        batch = self.pack(kwargs)
        if batch is None:
            return forward(**kwargs)
        return_dict = kwargs.get("return_dict")
        out = forward(**{**kwargs, **batch.inputs, "attention_mask": None, "return_dict": True})
        last = out.last_hidden_state
        padded = batch.pad(last)
        if out.get("hidden_states") is not None:  # holds None where output_hidden_states selects layers
            out.hidden_states = tuple(
                h if h is None else padded if h is last else batch.pad(h) for h in out.hidden_states
            )
        out.last_hidden_state = padded
        if out.get("pooler_output") is not None:
            out.pooler_output = self.pool(padded)
        if return_dict is None:
            return_dict = getattr(self.encoder.config, "return_dict", True)
        return out if return_dict else out.to_tuple()

    def pack(self, kwargs: dict[str, Any]) -> _PackedBatch | None:
        """The packed form of a call, or None for one that has to run as it is (correct, but not unpadded)."""
        mask, tokens = kwargs.get("attention_mask"), kwargs.get("input_ids")
        if tokens is None:
            tokens = kwargs.get("inputs_embeds")
        if mask is None or tokens is None or mask.shape != tokens.shape[:2] or kwargs.get("cu_seq_lens_q") is not None:
            return None
        given = {name for name, x in kwargs.items() if x is not None}
        if unknown := given.difference(PASSED, PACKED, ("attention_mask",)):
            warnings.warn(f"embedkern: a call with {', '.join(sorted(unknown))} runs padded", stacklevel=3)
            return None
        rows, length = tokens.shape[:2]
        mask = mask.to(device=tokens.device, dtype=torch.bool)
        (indices,) = mask.flatten().nonzero(as_tuple=True)  # the one synchronisation: T sizes everything
        if len(indices) == rows * length:
            kwargs["attention_mask"] = None  # no padding: dense attention, and no mask to read
            return None
        lengths = mask.sum(1)
        if len(indices) == 0:
            return None
        if self.reads_first_token and bool((~mask[:, 0] & (lengths > 0)).any()):
            warnings.warn(
                "embedkern: a batch padded on the left runs padded, because the pooler or head reads the first "
                "position, padding or not; pad on the right",
                stacklevel=3,
            )
            return None
        inputs = {name: kwargs[name] for name in PACKED if name in given}
        inputs.setdefault("position_ids", self.position_ids(tokens))
        packed = {name: x.expand(rows, *x.shape[1:]).flatten(0, 1)[indices][None] for name, x in inputs.items()}
        packed["cu_seq_lens_q"] = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        packed["max_length_q"] = length  # an upper bound: the exact one would cost a synchronisation
        return _PackedBatch(packed, indices, (rows, length))

    def position_ids(self, tokens: Tensor) -> Tensor:
        """The positions the encoder gives a padded batch when it is told none: (1 or B, L)."""
        embeddings = self.encoder.embeddings
        if not hasattr(embeddings, "create_position_ids_from_input_ids"):
            return torch.arange(tokens.shape[1], device=tokens.device)[None]  # padding counts, on the left too
        # RoBERTa counts from padding_idx + 1 the tokens that aren't padding_idx, whatever attention_mask says.
        if tokens.ndim == 2:
            return embeddings.create_position_ids_from_input_ids(tokens, embeddings.padding_idx)
        return embeddings.create_position_ids_from_inputs_embeds(tokens, embeddings.padding_idx)

    def pool(self, hidden: Tensor) -> Tensor:
        """The encoder's own pooler, which took the first packed token, on the padded layout: (B, L, C) → (B, C)."""
        activation = getattr(self.encoder, "pooler_activation", None)
        if activation is None:
            return self.encoder.pooler(hidden)
        return activation(self.encoder.pooler(hidden[:, 0]))  # ALBERT's pooler is a bare linear layer


def patch(
    model: M,
    *,
    temperature: Any = None,
    bidirectional: bool | None = None,
    unpad: bool = True,
    trainable_temperature: bool = False,
) -> M:
    """Run a model's encoders on embedkern's attention, in place, and with `unpad` on packed tokens.

    Args:
        model: a transformers model, a SentenceTransformer, or a module around them (PEFT, DDP). Served: BERT, RoBERTa,
            XLM-RoBERTa, CamemBERT, DistilBERT, ELECTRA and ALBERT, with any head.
        unpad: compute no padding: a batch (B, L) with an attention mask (B, L) runs as (1, T) and comes back as
            (B, L, C) with zeros at padding. Otherwise only the attention is replaced.
        temperature, bidirectional, trainable_temperature: not served yet.

    Returns:
        The same model.

    Raises:
        ValueError: nothing to patch, a model without attention interface, or one that is patched already.
        NotImplementedError: a model family, head or option that isn't served yet. Nothing is changed then.
        TypeError: model isn't a torch module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, want a torch.nn.Module")
    if temperature is not None or trainable_temperature:
        raise NotImplementedError("temperature: patched models don't take one yet")
    if bidirectional is not None:
        raise NotImplementedError("bidirectional: decoders aren't served yet, and encoders need no switch")
    patches = [_Patch(encoder, reads_first_token) for encoder, reads_first_token in _encoders(model, unpad)]
    if any("_embedkern_patch" in vars(patch.encoder) for patch in patches):
        raise ValueError("model: already patched; unpatch it first")
    for patch in patches:
        patch.install(unpad)
    return model


def unpatch(model: M) -> M:
    """Undo `patch`: the same functions, attention implementation, outputs and state dict as before.

    Raises:
        ValueError: model isn't patched.
    """
    patches = [vars(module)["_embedkern_patch"] for module in model.modules() if "_embedkern_patch" in vars(module)]
    if not patches:
        raise ValueError("model: not patched")
    for patch in patches:
        patch.remove()
    return model


@contextmanager
def patched(model: M, **options: Any) -> Iterator[M]:
    """`patch(model, **options)` for the length of a `with` block."""
    patch(model, **options)
    try:
        yield model
    finally:
        unpatch(model)


def _encoders(model: nn.Module, unpad: bool) -> list[tuple[PreTrainedModel, bool]]:
    """The encoders to patch, each with whether something reads its first position; raises if any can't be served."""
    found: dict[int, tuple[PreTrainedModel, bool]] = {}

    def visit(module: nn.Module, head: PreTrainedModel | None) -> bool:
        if isinstance(module, PreTrainedModel):
            if _is_served(module):
                _check_options(module, head, unpad)
                reads_first_token = head is not None or getattr(module, "pooler", None) is not None
                found[id(module)] = (module, reads_first_token or found.get(id(module), (None, False))[1])
                return True
            head = module
        served = [visit(child, head) for child in module.children()]
        if module is head and not any(served):
            _refuse(module)
        return any(served)

    if not visit(model, None):
        raise ValueError(f"model: found no transformers model in {type(model).__name__}")
    return list(found.values())


def _is_served(model: PreTrainedModel) -> bool:
    # A subclass counts (FSDP makes one) unless it has its own forward, about which nothing is known.
    bases = (base for base in type(model).__mro__ if f"{base.__module__}.{base.__qualname__}" in SERVED)
    return any(type(model).forward is vars(base)["forward"] for base in bases)


def _check_options(encoder: PreTrainedModel, head: PreTrainedModel | None, unpad: bool) -> None:
    name = type(encoder if head is None else head).__name__
    if getattr(encoder.config, "is_decoder", False):
        raise NotImplementedError(f"{name}: decoders (config.is_decoder) aren't served yet")
    if unpad and hasattr(head, "qa_outputs"):
        raise NotImplementedError(f"{name}: its softmax over positions includes the padding; patch with unpad=False")
    if unpad and getattr(encoder.config, "chunk_size_feed_forward", False):
        raise NotImplementedError(
            f"{name}: config.chunk_size_feed_forward has to divide the length, which packing changes; use unpad=False"
        )


def _refuse(model: PreTrainedModel) -> NoReturn:
    name = type(model).__name__
    if getattr(model, "_supports_attention_backend", False):
        raise NotImplementedError(f"{name}: patch doesn't serve this family yet; attn_implementation='{NAME}' may do")
    raise ValueError(f"{name}: its attention doesn't go through transformers' attention interface")
