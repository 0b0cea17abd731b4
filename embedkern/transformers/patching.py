"""`patch`, `unpatch` and `patched`: switching a loaded model over, and back."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .families import Family, attention_modules, family_of, reads_first
from .interface import NAME
from .unpad import Forward

M = TypeVar("M", bound=nn.Module)
Temperature = float | list[float] | Callable[[Tensor], Tensor]
_live: weakref.WeakSet[Patch] = weakref.WeakSet()


class Absent:
    """Stands for an attribute that wasn't there, also in copies and pickles."""


class Method:
    """Stands for a module's method while its patch is active.

    As an attribute that refers to its module, rather than a closure over it, it follows the module through
    `copy.deepcopy` and pickling.
    """

    def __init__(self, patch: Patch, module: nn.Module, name: str, function: Callable[..., Any]) -> None:
        self.patch, self.module, self.name, self.function = patch, module, name, function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.patch.active:
            return self.function(self.module, *args, **kwargs)
        return getattr(type(self.module), self.name)(self.module, *args, **kwargs)


class Patch:
    """What `patch` does to one encoder, and how to undo it.

    A plain object, not a module, so that the encoder's state dict doesn't change.
    """

    def __init__(self, encoder: PreTrainedModel, family: Family, reads_first: bool) -> None:
        self.encoder: Any = encoder
        self.family = family
        self.reads_first = reads_first
        self.layers = attention_modules(encoder)
        self.replaced: list[tuple[nn.Module, str, Any, Any]] = []  # module, name, ours, what was in its __dict__
        configs: dict[int, Any] = {id(m.config): m.config for m in encoder.modules() if hasattr(m, "config")}
        # Models may share a config object: the first patch knows what to restore, the last one restores it.
        known = {id(config): before for patch in _live for config, before in patch.configs}
        self.configs: list[tuple[Any, tuple[str | None, Any]]] = [
            (c, known.get(i, (c._attn_implementation, vars(c).get("is_causal", Absent)))) for i, c in configs.items()
        ]

    def install(self, unpad: bool, bidirectional: bool | None, temperatures: list[Any], trainable: bool) -> None:
        vars(self.encoder)["_embedkern_patch"] = self
        for module, name, function in self.family.adapt(self.encoder) if self.family.adapt else ():
            self._replace(module, name, Method(self, module, name, function))
        if self.family.tokens and (unpad or not self.family.hands_on):
            self._replace(self.encoder, "forward", Forward(self, unpad))
        for layer, temperature in zip(self.layers, temperatures, strict=True):
            if trainable:
                weight = next(layer.parameters())
                value = torch.tensor(float(temperature), device=weight.device).log()
                layer.register_parameter("log_temperature", nn.Parameter(value))
            elif temperature is not None:
                vars(layer)["_embedkern_temperature"] = temperature
        for config, _ in self.configs:
            config._attn_implementation = NAME
            if self.family.decoder and bidirectional is not None:
                config.is_causal = not bidirectional
        _live.add(self)

    def _replace(self, module: nn.Module, name: str, function: Callable[..., Any]) -> None:
        self.replaced.append((module, name, function, vars(module).get(name, Absent)))
        vars(module)[name] = function

    def remove(self) -> None:
        _live.discard(self)
        in_use = {id(config) for patch in _live for config, _ in patch.configs}
        for config, (name, is_causal) in self.configs:
            if id(config) in in_use:
                continue
            config._attn_implementation = name
            if is_causal is not Absent:
                config.is_causal = is_causal
            else:
                vars(config).pop("is_causal", None)
        for layer in self.layers:
            vars(layer).pop("_embedkern_temperature", None)
            layer._parameters.pop("log_temperature", None)
        del vars(self.encoder)["_embedkern_patch"]
        for module, name, ours, before in self.replaced:
            # Somebody (accelerate's autocast) may have wrapped it since: their wrapper stays and finds us inactive.
            state = vars(module)
            if ours not in (state.get(name), getattr(state.get(name), "__func__", None)):
                continue
            if before is Absent:
                del state[name]
            else:
                state[name] = before

    @property
    def active(self) -> bool:
        # The implementation may have been changed under the patch: cu_seq_lens_q would mean nothing to eager or sdpa.
        return (
            vars(self.encoder).get("_embedkern_patch") is self
            # Dynamo takes a config's integers, windows among them, for constants if it meets it in a module first.
            and self.encoder.config._attn_implementation == NAME
            and all(config._attn_implementation == NAME for config, _ in self.configs)
        )

    @property
    def own_forward(self) -> Callable[..., Any]:
        """The encoder's forward before `patch`."""
        before = next((b for m, name, _, b in self.replaced if m is self.encoder and name == "forward"), Absent)
        return type(self.encoder).forward.__get__(self.encoder) if before is Absent else before

    @property
    def by_distance(self) -> bool:
        """Whether attention counts distances between indices."""
        return self.family.relative or getattr(self.encoder.config, "sliding_window", None) is not None


def patch(
    model: M,
    *,
    temperature: Temperature | None = None,
    bidirectional: bool | None = None,
    unpad: bool = True,
    trainable_temperature: bool = False,
) -> M:
    """Run a model's encoders on embedkern's attention, in place, and with `unpad` on packed tokens.

    Args:
        model: a transformers model, a SentenceTransformer, or a module around them (PEFT, DDP), with any head. The
            docs list the families served.
        temperature: divides the attention's scores (after bias and softcap): a number > 0; a list, one for each
            attention layer of the whole model; or a function of the sequences' lengths, int (B,) → (B,), (B, H) or
            (B, 1 or H, 1, 1), as `log_length_temperature` gives.
        bidirectional: True lets a causal decoder attend to both sides, False keeps it causal; None is as configured.
        unpad: compute no padding: a batch (B, L) with an attention mask (B, L) runs as (1, T) and comes back as
            (B, L, C) with zeros at padding. Otherwise only the attention is replaced.
        trainable_temperature: each attention layer gets a parameter `log_temperature`, from `temperature` or 1;
            `export_temperature` reads them, `unpatch` removes them.

    Returns:
        The same model.

    Raises:
        ValueError: nothing to patch, a model without attention interface, one that is patched already, a temperature
            ≤ 0 or a list of another length, bidirectional=True without a decoder.
        NotImplementedError: a model family, head or option that isn't served. Nothing is changed then.
        TypeError: model isn't a torch module, or temperature none of the above.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, want a torch.nn.Module")
    patches = [Patch(*found) for found in _encoders(model, unpad, bidirectional)]
    if any("_embedkern_patch" in vars(patch.encoder) for patch in patches):
        raise ValueError("model: already patched; unpatch it first")
    if bidirectional and not any(patch.family.decoder for patch in patches):
        raise ValueError(f"bidirectional: {type(model).__name__} has no causal decoder that is served")
    temperatures = _temperatures(temperature, trainable_temperature, sum(len(patch.layers) for patch in patches))
    for patch in patches:
        own, temperatures = temperatures[: len(patch.layers)], temperatures[len(patch.layers) :]
        patch.install(unpad, bidirectional, own, trainable_temperature)
    return model


def unpatch(model: M) -> M:
    """Undo `patch`: the same functions, attention implementation, outputs and state dict as before.

    Raises:
        ValueError: model isn't patched.
    """
    for patch in _patches(model):
        patch.remove()
    for module in model.modules():
        if getattr(module, "can_flatten_inputs", False):  # sentence-transformers asked while the attention was ours
            module.unpad_inputs = module.unpad_inputs
    return model


@contextmanager
def patched(model: M, **options: Any) -> Iterator[M]:
    """`patch(model, **options)` for the length of a `with` block."""
    patch(model, **options)
    try:
        yield model
    finally:
        unpatch(model)


def export_temperature(model: nn.Module) -> list[float]:
    """The temperatures that a model patched with trainable_temperature has now, one for each attention layer.

    `patch(model, temperature=…)` takes the list.

    Raises:
        ValueError: model isn't patched, or its temperature isn't trainable.
    """
    layers: list[Any] = [layer for patch in _patches(model) for layer in patch.layers]
    if not all("log_temperature" in layer._parameters for layer in layers):
        raise ValueError("model: patched without trainable_temperature")
    return [layer.log_temperature.exp().item() for layer in layers]


def _patches(model: nn.Module) -> list[Patch]:
    patches = [vars(module)["_embedkern_patch"] for module in model.modules() if "_embedkern_patch" in vars(module)]
    if not patches:
        raise ValueError("model: not patched")
    return patches


def _temperatures(temperature: Any, trainable: bool, layers: int) -> list[Any]:
    """One for each layer: a number, a function, or None for a layer that has none."""
    if isinstance(temperature, (list, tuple)):
        if len(temperature) != layers:
            raise ValueError(f"temperature: got {len(temperature)} numbers, want one for each of {layers} layers")
        values = list(temperature)
    else:
        values = [1.0 if temperature is None and trainable else temperature] * layers
    for value in values:
        if callable(value):
            if trainable:
                raise ValueError("trainable_temperature: starts from numbers, not from a function of lengths")
        elif value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise TypeError(f"temperature: got {type(value).__name__}, want a number, a list of them or a function")
        elif value is not None and not value > 0:
            raise ValueError(f"temperature: got {value}, want > 0")
    return values


def _encoders(model: nn.Module, unpad: bool, bidirectional: bool | None) -> list[tuple[PreTrainedModel, Family, bool]]:
    """The encoders to patch, each with whether a head reads its first position; raises if any can't be served."""
    found: dict[int, tuple[PreTrainedModel, Family, bool]] = {}

    def visit(module: nn.Module, head: PreTrainedModel | None) -> bool:
        if isinstance(module, PreTrainedModel):
            family = family_of(module)
            if family is not None:
                _check_options(module, family, head, unpad, bidirectional)
                reads = head is not None and not family.decoder and reads_first(head)
                found[id(module)] = (module, family, reads or (id(module) in found and found[id(module)][2]))
                return True
            head = module
        served = [visit(child, head) for child in module.children()]
        if module is head and not any(served):
            _refuse(module)
        return any(served)

    if not visit(model, None):
        raise ValueError(f"model: found no transformers model in {type(model).__name__}")
    return list(found.values())


def _check_options(
    encoder: PreTrainedModel, family: Family, head: PreTrainedModel | None, unpad: bool, bidirectional: bool | None
) -> None:
    name = type(encoder if head is None else head).__name__
    if getattr(encoder.config, "is_decoder", False):
        raise NotImplementedError(f"{name}: decoders with cross-attention (config.is_decoder) aren't served")
    if unpad and family.tokens and hasattr(head, "qa_outputs"):
        raise NotImplementedError(f"{name}: its softmax over positions includes the padding; patch with unpad=False")
    if unpad and getattr(encoder.config, "chunk_size_feed_forward", False):
        raise NotImplementedError(
            f"{name}: config.chunk_size_feed_forward has to divide the length, which packing changes; use unpad=False"
        )
    if bidirectional is False and getattr(encoder.config, "use_bidirectional_attention", False):
        raise ValueError(f"bidirectional: {name} was trained with config.use_bidirectional_attention")


def _refuse(model: PreTrainedModel) -> NoReturn:
    name = type(model).__name__
    if getattr(model, "_supports_attention_backend", False):
        raise NotImplementedError(f"{name}: patch doesn't serve this family; attn_implementation='{NAME}' may do")
    raise ValueError(f"{name}: its attention doesn't go through transformers' attention interface")
