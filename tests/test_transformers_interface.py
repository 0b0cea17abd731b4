"""attn_implementation="embedkern" on its own, and its masks."""

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", minversion="5")

from transformers import masking_utils  # noqa: E402
from transformers_cases import LENGTHS, batch, tiny  # noqa: E402

from embedkern.transformers import interface, make_mask, patch  # noqa: E402
from embedkern.transformers.masks import Pattern  # noqa: E402


def test_from_config_and_decoders():
    """attn_implementation="embedkern" alone: causal masks, grouped heads and padding on a family without a patch."""
    config = transformers.LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = transformers.LlamaModel._from_config(config).double().eval()
    for inputs in (batch(model), batch(model, "left"), {"input_ids": torch.arange(8).view(2, 4)}):
        real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        model.set_attn_implementation("sdpa")  # eager's softmax is float32
        wanted = model(**inputs, use_cache=False).last_hidden_state
        model.set_attn_implementation("embedkern")
        got = model(**inputs, use_cache=False).last_hidden_state
        torch.testing.assert_close(got[real], wanted[real], rtol=1e-10, atol=1e-10)
    # decoding with a cache
    ids = inputs["input_ids"]
    cache = model(ids[:, :3], use_cache=True).past_key_values
    step = model(ids[:, 3:], past_key_values=cache).last_hidden_state
    torch.testing.assert_close(step[:, 0], wanted[:, 3], rtol=1e-10, atol=1e-10)


def test_packed_input_without_patch():
    """The path that sentence-transformers' flattening takes."""
    model = tiny("Bert", implementation="embedkern")
    assert model.config._attn_implementation == "embedkern"
    inputs = batch(model)
    real = inputs["attention_mask"].bool()
    wanted = model(**inputs).last_hidden_state[real]
    cu = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    packed = {
        "input_ids": inputs["input_ids"][real][None],
        "position_ids": torch.cat([torch.arange(n) for n in LENGTHS])[None],
        "cu_seq_lens_q": cu,
        "cu_seq_lens_k": cu,
        "max_length_q": 9,
        "max_length_k": 9,
    }
    torch.testing.assert_close(model(**packed).last_hidden_state[0], wanted, rtol=1e-10, atol=1e-10)
    patch(model)
    torch.testing.assert_close(model(**packed).last_hidden_state[0], wanted, rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="padding mask"):
        model(**packed, attention_mask=torch.ones(1, sum(LENGTHS)))
    with pytest.raises(ValueError, match="batch of 1"):
        model(inputs["input_ids"], cu_seq_lens_q=cu)


@pytest.mark.parametrize("additive", [False, True])
def test_complete_mask_on_packed_input(additive):
    model = tiny("Bert", implementation="embedkern")
    ids = torch.randint(3, 60, (1, 10))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
    band = ((torch.arange(10)[:, None] - torch.arange(10)).abs() < 2)[None, None]
    alone = [model(i, attention_mask=band[..., : i.shape[1], : i.shape[1]])[0][0] for i in (ids[:, :4], ids[:, 4:])]
    mask = torch.zeros(band.shape, dtype=torch.float64).masked_fill(~band, -torch.inf) if additive else band
    cu = torch.tensor([0, 4, 10])
    got = model(ids, position_ids=positions, attention_mask=mask, cu_seq_lens_q=cu)[0][0]
    torch.testing.assert_close(got, torch.cat(alone), rtol=1e-10, atol=1e-10)


def test_unknown_mask_function_becomes_a_mask():
    from transformers.masking_utils import bidirectional_mask_function

    common = {"batch_size": 2, "q_length": 3, "kv_length": 3, "allow_is_bidirectional_skip": True}
    common["cache_position"] = torch.arange(3)  # what transformers 5.0 passes in place of q_length
    key_mask = torch.tensor([[True, True, False], [True, True, True]])
    assert make_mask(mask_function=bidirectional_mask_function, **common) is None
    assert torch.equal(
        make_mask(mask_function=bidirectional_mask_function, attention_mask=key_mask, **common), key_mask
    )
    odd = make_mask(mask_function=lambda b, h, q, k: (q + k) % 2 == 0, attention_mask=key_mask, **common)
    pattern = (torch.arange(3)[:, None] + torch.arange(3)) % 2 == 0
    assert torch.equal(odd, pattern & key_mask[:, None, None])
    # a static cache: keys before kv_offset are gone, keys beyond the mask not there yet
    got = make_mask(
        mask_function=bidirectional_mask_function, attention_mask=key_mask, **dict(common, kv_offset=1, kv_length=4)
    )
    assert got.tolist() == [[True, False, False, False], [True, True, False, False]]
    with pytest.raises(ValueError, match="3 dims"):
        make_mask(mask_function=bidirectional_mask_function, attention_mask=key_mask[None], **common)


def test_interface_against_sdpa():
    q, k, v = (torch.randn(2, heads, 5, 12, dtype=torch.float64) for heads in (4, 2, 2))
    v = torch.cat([v, v], -1)[..., :20]  # value's own width
    key_mask = torch.tensor([[True] * 3 + [False] * 2, [False] + [True] * 4])
    causal, free = nn.Module(), nn.Module()
    causal.is_causal, free.is_causal = True, False
    made_free = copy.copy(causal)
    made_free.config = transformers.LlamaConfig(is_causal=False)
    sdpa = partial(nn.functional.scaled_dot_product_attention, q, k, v, enable_gqa=True)
    cases = [
        (causal, {}, sdpa(is_causal=True)),
        (nn.Module(), {}, sdpa(is_causal=True)),  # sdpa's default
        (free, {}, sdpa()),
        (made_free, {}, sdpa()),
        (causal, {"is_causal": False}, sdpa()),
        (free, {"is_causal": True, "scaling": 0.7}, sdpa(is_causal=True, scale=0.7)),
        (causal, {"attention_mask": key_mask}, sdpa(attn_mask=key_mask[:, None, None])),
    ]
    for module, options, wanted in cases:
        out, weights = interface.attention_forward(module, q, k, v, options.pop("attention_mask", None), **options)
        assert weights is None
        torch.testing.assert_close(out, wanted.transpose(1, 2), rtol=1e-12, atol=1e-12)
    z = 2.0 * torch.tanh(q @ k.repeat_interleave(2, 1).mT * 12**-0.5 / 2.0)
    capped = interface.attention_forward(free, q, k, v, None, softcap=2.0)[0]
    torch.testing.assert_close(
        capped, (z.softmax(-1) @ v.repeat_interleave(2, 1)).transpose(1, 2), rtol=1e-12, atol=1e-12
    )
    with pytest.raises(NotImplementedError, match="align"):
        interface.attention_forward(causal, q[:, :, :3], k, v, None)


def test_variants_that_the_op_lacks_raise():
    model = tiny("Bert", implementation="embedkern")
    layer = model.encoder.layer[0].attention.self
    x = torch.randn(1, 4, 3, 8, dtype=torch.float64)
    for name in (*interface.VARIANTS, "sliding_window"):
        with pytest.raises(NotImplementedError, match=name):
            interface.attention_forward(layer, x, x, x, None, **{name: x})
    with pytest.raises(ValueError, match="cu_seq_lens_k"):
        interface.attention_forward(layer, x, x[:, :, :2], x[:, :, :2], None, cu_seq_lens_q=torch.tensor([0, 3]))


def test_output_attentions_warns_once(caplog):
    model = patch(tiny("Bert"))
    type(interface.logger).warning_once.cache_clear()
    inputs = batch(model)
    for _ in range(2):
        out = model(**inputs, output_attentions=True)
        assert not out.attentions or out.attentions == (None, None)
    messages = [r.getMessage() for r in caplog.records if "attention weights" in r.getMessage()]
    assert len(messages) == 1


def unlike(batch, head, query, key):
    return (query + key) % 3 > 0


def traced_mask(make_function, arguments):
    """`make_mask` under torch.compile, where the closure is made inside the trace, as transformers does it."""

    def call(padding):
        mask = make_mask(mask_function=make_function(), attention_mask=padding, **arguments)
        return (mask.key_mask, mask.options) if isinstance(mask, Pattern) else (mask, None)

    torch._dynamo.reset()
    mask, options = torch.compile(call, backend="eager", fullgraph=True)(arguments.pop("attention_mask"))
    return mask if options is None else SimpleNamespace(key_mask=mask, options=options)


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("sizes", [(5, 5, 0, 0), (2, 5, 3, 0), (2, 4, 3, 1), (3, 5, 0, 0)])
@pytest.mark.parametrize(
    ("name", "make_function", "known"),
    [
        ("causal", lambda: masking_utils.causal_mask_function, True),
        ("window", lambda: masking_utils.sliding_window_causal_mask_function(2), True),
        ("both sides", lambda: masking_utils.sliding_window_bidirectional_mask_function(1), True),
        ("chunks", lambda: masking_utils.chunked_causal_mask_function(2, torch.zeros(2, dtype=torch.long)), False),
        ("nothing", lambda: masking_utils.sliding_window_causal_mask_function(0), False),
        ("composed", lambda: masking_utils.and_masks(unlike, masking_utils.causal_mask_function), False),
        ("either", lambda: masking_utils.or_masks(unlike, masking_utils.causal_mask_function), False),
    ],
)
def test_mask_functions(name, make_function, known, sizes, traced):
    queries, keys, query_offset, key_offset = sizes
    padding = torch.tensor([[True] * 4 + [False], [False] + [True] * 4])
    arguments = {"batch_size": 2, "q_length": queries, "kv_length": keys, "q_offset": query_offset}
    arguments |= {"kv_offset": key_offset, "attention_mask": padding}
    size = {"window": 2, "both sides": 1, "chunks": 2, "nothing": 0}.get(name)
    arguments |= {"local_size": size, "config": SimpleNamespace(sliding_window=None if name == "chunks" else size)}
    wanted = masking_utils.sdpa_mask(mask_function=make_function(), **arguments, allow_is_causal_skip=False)
    got = traced_mask(make_function, arguments) if traced else make_mask(mask_function=make_function(), **arguments)
    assert isinstance(got, torch.Tensor) != (known and queries + query_offset == keys + key_offset)
    if not isinstance(got, torch.Tensor):
        options, p = got.options, torch.arange(queries)[:, None] + keys - queries
        left, right = options["window"] or (-1, -1)
        j = torch.arange(keys)
        seen = got.key_mask[:, None, None] & ((j <= p) | (not options["causal"]))
        got = seen & ((j >= p - left) | (left < 0)) & ((j <= p + right) | (right < 0))
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("window", [None, 3])
def test_packed_by_position_ids(window, monkeypatch):
    """position_ids that begin anew keep sequences apart, formed as a mask; cu_seq_lens_q says the same without one."""
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=60, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, sliding_window=window,
    )  # fmt: skip
    model = transformers.MistralModel._from_config(config, attn_implementation="embedkern").double().eval()
    ids = torch.randint(3, 60, (1, 10))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
    alone = torch.cat([model(part, use_cache=False)[0][0] for part in (ids[:, :4], ids[:, 4:])])
    seen, original = [], interface.attention
    monkeypatch.setattr(interface, "attention", lambda *a, **k: (seen.append(k["mask"]), original(*a, **k))[1])
    got = model(ids, position_ids=positions, use_cache=False)[0][0]
    torch.testing.assert_close(got, alone, rtol=2e-5, atol=2e-5)
    assert [mask.shape for mask in seen] == [(1, 1, 10, 10)] * 2
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    got = compiled(ids, position_ids=positions, use_cache=False)[0][0]
    torch.testing.assert_close(got, alone, rtol=2e-5, atol=2e-5)
    assert [mask.shape for mask in seen] == [(1, 1, 10, 10)] * 4
    cu = torch.tensor([0, 4, 10])
    got = model(ids, position_ids=positions, cu_seq_lens_q=cu, use_cache=False)[0][0]
    torch.testing.assert_close(got, alone, rtol=2e-5, atol=2e-5)
    assert len(seen) == 4
