"""Pooling over layers: hooks against the hidden states a model returns, what stays alive, mixes and chosen layers."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import embedkern as ek
from embedkern import nn
from embedkern.nn.layer_pooling import find_layers

LAYERS, WIDTH = 4, 16


def multi_layer(**options: Any) -> nn.MultiLayerPooling:
    return nn.MultiLayerPooling(LAYERS, WIDTH, 6, 2, 8, **options)


class Plain(torch.nn.Module):
    """A model without transformers: a list of layers, then a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.norm = torch.nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.blocks:
            x = layer(x).tanh() + x
        return self.norm(x)


def transformers_model(kind: str) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 24,
             "vocab_size": 50, "max_position_embeddings": 40}  # fmt: skip
    if kind == "Bert":
        return transformers.BertModel(transformers.BertConfig(**sizes)).eval()
    config = transformers.Qwen2Config(**sizes, num_key_value_heads=1)
    return (
        transformers.Qwen2ForCausalLM(config).eval() if kind == "Qwen2 with a head" else transformers.Qwen2Model(config)
    )


@pytest.mark.parametrize("kind", ["Bert", "Qwen2", "Qwen2 with a head"])
def test_collect_equals_forward_on_hidden_states(kind: str) -> None:
    model = transformers_model(kind)
    tokens = torch.randint(1, 50, (3, 9))
    lengths = torch.tensor([9, 1, 4])
    mask = torch.arange(9) < lengths[:, None]
    hidden_states = model(tokens, attention_mask=mask.long(), output_hidden_states=True).hidden_states
    assert len(hidden_states) == LAYERS + 1
    for pooling in (multi_layer(), multi_layer(token_pooling="lasttoken"), nn.LayerPooling(LAYERS, [1, -1])):
        for places in ({"mask": mask}, {"lengths": lengths, "skip": torch.tensor([1, 1, 2])}):
            with pooling.collect(model, **places) as collected:
                model(tokens, attention_mask=mask.long())
            wanted = pooling(hidden_states[1:], **places)
            torch.testing.assert_close(collected.embedding, wanted)
            torch.testing.assert_close(pooling(hidden_states, **places), wanted)
            if "skip" in places:
                assert wanted[1].eq(0).all()
    gradients = [
        torch.autograd.grad(out.square().sum(), list(model.parameters()), allow_unused=True, retain_graph=True)
        for out in (collected.embedding[:, :5], wanted[:, :5])
    ]
    assert sum(g is not None for g in gradients[0]) > 10
    for a, b in zip(*gradients, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_collect_on_an_unpadded_and_on_a_checkpointed_model(checkpointing: bool) -> None:
    model = transformers_model("Bert").train(checkpointing)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if checkpointing:
        model.gradient_checkpointing_enable()
    tokens, mask = torch.randint(1, 50, (3, 9)), torch.arange(9) < torch.tensor([9, 2, 4])[:, None]
    pooling = multi_layer()
    places: Any = {"mask": mask, "skip": 1}
    wanted = pooling(model(tokens, attention_mask=mask.long(), output_hidden_states=True).hidden_states, **places)
    weight = model.encoder.layer[0].output.dense.weight
    wanted_gradient = torch.autograd.grad(wanted[:, 0].sum(), weight)[0]
    with ek.patched(model):
        with pooling.collect(model, **places) as collected:
            model(tokens, attention_mask=mask.long())
        torch.testing.assert_close(collected.embedding, wanted)
        torch.testing.assert_close(torch.autograd.grad(collected.embedding[:, 0].sum(), weight)[0], wanted_gradient)


def test_collect_on_a_plain_and_a_flattened_model() -> None:
    model, pooling = Plain(), multi_layer()
    x, cu_seqlens = torch.randn(1, 12, WIDTH), torch.tensor([0, 5, 5, 12])
    with pooling.collect(model, cu_seqlens=cu_seqlens) as collected:
        model(x)
    outputs = []
    handles = [layer.register_forward_hook(lambda m, i, o: outputs.append(o)) for layer in model.blocks]
    last = model(x)
    for handle in handles:
        handle.remove()
    wanted = pooling([y[0] for y in [*outputs[:-1], last]], cu_seqlens=cu_seqlens)
    torch.testing.assert_close(collected.embedding, wanted)
    assert wanted[1].eq(0).all()


def test_hidden_states_are_freed() -> None:
    model, pooling = Plain(), multi_layer()
    alive: list[int] = []
    produced: list[weakref.ref[Tensor]] = []

    def watch(module: Any, inputs: Any, output: Tensor) -> None:
        gc.collect()
        alive.append(sum(ref() is not None for ref in produced))
        produced.append(weakref.ref(output))

    handles = [layer.register_forward_hook(watch) for layer in model.blocks]
    with torch.no_grad(), pooling.collect(model) as collected:
        model(torch.randn(2, 5, WIDTH))
        embedding = collected.embedding
    assert alive == [0, 0, 0, 0]  # of the layers before, when each layer is done
    assert all(ref() is None for ref in produced)
    assert embedding.shape == (2, WIDTH)
    for handle in handles:
        handle.remove()


def test_hooks_are_gone_afterwards() -> None:
    model, pooling = Plain(), multi_layer()
    own = model.forward
    vars(model)["forward"] = own  # somebody's wrapper
    for failing in (False, True):
        try:
            with pooling.collect(model) as collected:
                assert sum(len(layer._forward_hooks) for layer in model.blocks) == LAYERS - 1
                model(torch.randn(2, 3, WIDTH + failing))
        except RuntimeError:
            assert failing
            with pytest.raises(RuntimeError, match="the model hasn't run inside collect"):
                _ = collected.embedding
        assert not any(layer._forward_hooks for layer in model.blocks)
        assert vars(model)["forward"] is own
    del vars(model)["forward"]
    with pooling.collect(model):
        pass
    assert "forward" not in vars(model)


def test_the_last_of_several_runs_counts() -> None:
    model, pooling = Plain(), nn.LayerPooling(LAYERS, 2)
    x = torch.randn(2, 2, 5, WIDTH)
    with pooling.collect(model) as collected:
        model(x[0])
        model(x[1])
    with pooling.collect(model) as alone:
        model(x[1])
    assert torch.equal(collected.embedding, alone.embedding)


def test_models_that_collect_refuses() -> None:
    with pytest.raises(NotImplementedError, match="Linear: found 0 lists of layers"):
        find_layers(torch.nn.Linear(2, 2))
    with pytest.raises(NotImplementedError, match="Sequential: found 2 lists of layers"):
        find_layers(torch.nn.Sequential(Plain(), Plain()))
    with (
        pytest.raises(ValueError, match="model must have num_layers = 3 layers, got 4"),
        nn.LayerPooling(3, 1).collect(Plain()),
    ):
        pass
    model, wrong = Plain(), torch.tensor([1, 2, 3])
    with (
        pytest.raises(ValueError, match=r"lengths must have shape \(2,\), got \(3,\)"),
        multi_layer().collect(model, lengths=wrong),
    ):
        model(torch.randn(2, 4, WIDTH))


@pytest.mark.parametrize("normalize", [False, True])
def test_layers_joined_averaged_and_as_a_grid(normalize: bool) -> None:
    states = [torch.randn(3, 5, WIDTH) for _ in range(LAYERS + 1)]
    lengths = torch.tensor([5, 0, 2])
    pooled = [ek.pool(x, lengths=lengths) for x in states[1:]]
    unit = (lambda x: F.normalize(x, dim=1)) if normalize else lambda x: x
    options: Any = {"normalize": normalize}
    joined = nn.LayerPooling(LAYERS, 3, **options)(states, lengths=lengths)
    torch.testing.assert_close(joined, unit(torch.cat(pooled[1:], 1)))
    mean = nn.LayerPooling(LAYERS, 2, combine="mean", dims=[10], **options)(states[1:], lengths=lengths)
    torch.testing.assert_close(mean, unit((pooled[2] + pooled[3])[:, :10] / 2))
    grid = nn.LayerPooling(LAYERS, [0, -1], combine=None, dims=[4, WIDTH], **options)(states, lengths=lengths)
    assert set(grid) == {(0, 4), (0, WIDTH), (3, 4), (3, WIDTH)}
    for (layer, dim), x in grid.items():
        torch.testing.assert_close(x, unit(pooled[layer][:, :dim]))
    assert list(nn.LayerPooling(LAYERS, [2], combine=None)(states)) == [(2, WIDTH)]
    assert "layers=[1, 2, 3]" in repr(nn.LayerPooling(LAYERS, 3))


def test_scalar_mix() -> None:
    mix = nn.ScalarMix(3)
    assert {name: x.tolist() for name, x in mix.state_dict().items()} == {"weights": [0, 0, 0], "gamma": [1]}
    torch.nn.init.normal_(mix.weights)
    torch.nn.init.normal_(mix.gamma)
    layers = [torch.randn(2, 5, 8, requires_grad=True) for _ in range(4)]
    wanted = mix.gamma * (torch.stack(layers[1:]) * mix.weights.softmax(0).view(3, 1, 1, 1)).sum(0)
    inputs = [*layers[1:], mix.weights, mix.gamma]
    for got in (mix(layers), mix(layers[1:])):
        torch.testing.assert_close(got, wanted)
        for a, b in zip(
            *(torch.autograd.grad(x.sin().sum(), inputs, retain_graph=True) for x in (got, wanted)), strict=True
        ):
            torch.testing.assert_close(a, b)
    assert mix([x.bfloat16() for x in layers]).dtype == torch.bfloat16
    for count in (2, 5):
        with pytest.raises(ValueError, match=f"hidden_states must be 3 tensors, or one more, got {count}"):
            mix([layers[0]] * count)


@pytest.mark.parametrize(
    ("message", "make"),
    [
        ("num_layers must be ≥ 1, got 0", lambda: nn.ScalarMix(0)),
        ("layers must be in a model's 4, got 5", lambda: nn.LayerPooling(4, 5)),
        (r"layers must be in a model's 4, got \[4\]", lambda: nn.LayerPooling(4, [4])),
        ("layers must be in a model's 4, got 0", lambda: nn.LayerPooling(4, 0)),
        ("combine must be 'concat', 'mean' or None, got 'sum'", lambda: nn.LayerPooling(4, combine="sum")),
        (r"dims must be numbers ≥ 1, one of them if .* got \[2, 4\]", lambda: nn.LayerPooling(4, dims=[2, 4])),
        ("mode must be one of", lambda: nn.LayerPooling(4, token_pooling="average")),
        ("hidden_states must be 4 tensors, or one more, got 1", lambda: multi_layer()([torch.randn(2, 3, WIDTH)])),
    ],
)  # fmt: skip
def test_bad_options(message: str, make: Any) -> None:
    with pytest.raises(ValueError, match=message):
        make()
