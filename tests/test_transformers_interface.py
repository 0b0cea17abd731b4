"""attn_implementation="embedkern" on its own, and its masks."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", minversion="5")

from transformers_cases import LENGTHS, batch, tiny  # noqa: E402

from embedkern.transformers import interface, make_mask, patch  # noqa: E402


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
