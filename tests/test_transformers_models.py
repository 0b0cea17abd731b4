"""patch on the families beyond BERT's relatives, against transformers' own attention."""

import copy
import inspect
import pickle

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5")

from transformers_cases import LENGTHS, assert_same_gradients, batch, gradients, tokens_computed  # noqa: E402

from embedkern.transformers import interface, patch, patched, unpatch  # noqa: E402

# As many positions as the longest sequence needs, fewer than a packed batch has tokens.
COMMON = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 12,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SPECIAL = {"cls_token_id": 1, "sep_token_id": 2}
GROUPED = {"num_key_value_heads": 2}
MIXED = {"layer_types": ["sliding_attention", "full_attention"]}
T5 = {
    "vocab_size": 60,
    "d_model": 24,
    "d_kv": 6,
    "d_ff": 40,
    "num_layers": 2,
    "num_heads": 4,
    "initializer_factor": 4.0,
}
T5 |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 6}
GEMMA3 = COMMON | GROUPED | MIXED | {"head_dim": 8, "sliding_window": 3, "query_pre_attn_scalar": 8}
ENCODERS = {
    "ModernBertModel": COMMON | SPECIAL | MIXED | {"local_attention": 4},
    "NomicBertModel": COMMON | {"head_dim": 8},
    "GteModel": COMMON | {"type_vocab_size": 2},
    "T5EncoderModel": T5,
    "UMT5EncoderModel": T5,
    "MT5EncoderModel": T5,
    "MPNetModel": COMMON | {"hidden_size": 24, "pad_token_id": 1, "eos_token_id": 2},
    "CLIPTextModel": COMMON | {"eos_token_id": 61},
    "SiglipTextModel": COMMON | {"projection_size": 32},
}
DECODERS = {
    "LlamaModel": COMMON | GROUPED,
    "MistralModel": COMMON | GROUPED | {"sliding_window": 3},
    "Qwen2Model": COMMON | GROUPED | MIXED | {"use_sliding_window": True, "sliding_window": 3},
    "Qwen3Model": COMMON | GROUPED | {"head_dim": 8},
    "Gemma3TextModel": GEMMA3,
    "Phi3Model": COMMON | GROUPED | {"sliding_window": 3},
}
# Their rotary embeddings, norms or eager softmax compute in float32, whatever the model's dtype. Eager's mask, the
# least float64, is −inf there and makes NaN of padding, so that sdpa is what these are compared to.
FLOAT32_INSIDE = {"ModernBertModel", "NomicBertModel", "GteModel", "CLIPTextModel", "SiglipTextModel", *DECODERS}


def make(name, dtype=torch.float64, **options):
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    config = model_class.config_class(**({**ENCODERS, **DECODERS}[name] | options))
    model = (
        model_class._from_config(config, attn_implementation="sdpa" if name in FLOAT32_INSIDE else "eager")
        .to(dtype)
        .eval()
    )
    for parameter in model.parameters():  # norms and biases that start as ones and zeros
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def tolerance(name):
    return {"rtol": 2e-5, "atol": 2e-5} if name in FLOAT32_INSIDE else {"rtol": 1e-9, "atol": 1e-9}


def outcome(model, inputs, weight):
    """Hidden states, and the parameters' gradients of a weighted sum over the real tokens."""
    out = model(**inputs, output_hidden_states=True)
    states = out.hidden_states[1:] + (out.last_hidden_state,)
    return states, gradients(model, sum((h * weight).sum() for h in states))


CASES = [(name, None) for name in (*ENCODERS, *DECODERS)] + [(name, True) for name in DECODERS]


@pytest.mark.parametrize(("name", "bidirectional"), CASES)
def test_hidden_states_and_gradients_equal_eager(name, bidirectional):
    model = make(name)
    model.pooler = None
    for side in ("right", "left"):
        inputs = batch(model, side)
        real = inputs["attention_mask"].bool()
        # SigLIP pools the last position; CLIP the first, without an end-of-text token.
        packs = (name, side) not in {("SiglipTextModel", "right"), ("CLIPTextModel", "left")}
        weight = torch.randn(*real.shape, model.config.hidden_size, dtype=torch.float64) * real[..., None]
        if bidirectional:
            model.config.is_causal = False
        states, wanted = outcome(model, inputs, weight)
        vars(model.config).pop("is_causal", None)
        for unpad in (True, False):
            with patched(model, unpad=unpad, bidirectional=bidirectional):
                assert tokens_computed(model, inputs) == ((1, sum(LENGTHS)) if unpad and packs else real.shape)
                ours, got = outcome(model, inputs, weight)
            for mine, theirs in zip(ours, states, strict=True):
                torch.testing.assert_close(mine[real], theirs[real], **tolerance(name))
            scale = max(1.0, max(g.abs().max().item() for g in wanted.values()))
            assert_same_gradients(got, wanted, tolerance(name)["rtol"], tolerance(name)["atol"] * scale)


@pytest.mark.parametrize("name", [*ENCODERS, *DECODERS])
def test_unpatch_restores_everything(name):
    model = make(name)
    inputs = batch(model)
    before = {key: dict(vars(module)) for key, module in model.named_modules()}
    config = dict(vars(model.config))
    functions = {key: module.forward for key, module in model.named_modules()}
    state, wanted = list(model.state_dict()), model(**inputs).last_hidden_state
    patch(model, bidirectional=True if name in DECODERS else None, trainable_temperature=True)
    model(**inputs)
    assert unpatch(model) is model
    for key, module in model.named_modules():
        assert vars(module).keys() == before[key].keys()
    assert all(module.forward == functions[key] for key, module in model.named_modules())
    assert vars(model.config) == config
    assert list(model.state_dict()) == state
    assert torch.equal(model(**inputs).last_hidden_state, wanted)


def test_embedding_gemma(monkeypatch):
    """config.use_bidirectional_attention, by mask functions of Gemma's own: packed calls form no mask all the same."""
    model = make("Gemma3TextModel", use_bidirectional_attention=True, sliding_window=4)
    inputs = batch(model)
    real = inputs["attention_mask"].bool()
    wanted = model(**inputs).last_hidden_state
    calls = spy(monkeypatch, "attention_varlen")
    with patched(model):
        got = model(**inputs).last_hidden_state
    assert [call.get("window") for call in calls] == [(2, 2), None]
    assert not any(call.get("causal") for call in calls)
    torch.testing.assert_close(got[real], wanted[real], rtol=2e-5, atol=2e-5)
    with patched(model, unpad=False):
        torch.testing.assert_close(model(**inputs).last_hidden_state[real], wanted[real], rtol=2e-5, atol=2e-5)
    with pytest.raises(ValueError, match="use_bidirectional_attention"):
        patch(model, bidirectional=False)


def spy(monkeypatch, name):
    calls, original = [], getattr(interface, name)
    monkeypatch.setattr(interface, name, lambda *a, **k: (calls.append(k), original(*a, **k))[1])
    return calls


@pytest.mark.parametrize("unpad", [True, False])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ModernBertModel", [{"window": (2, 2)}, {"window": None}]),
        ("LlamaModel", [{"causal": True, "window": None}] * 2),
        ("MistralModel", [{"causal": True, "window": (2, 0)}] * 2),
        ("Qwen2Model", [{"causal": True, "window": (2, 0)}, {"causal": True, "window": None}]),
        ("CLIPTextModel", [{"causal": True}] * 2),
        ("T5EncoderModel", [{"relative_bias": (4, 13)}] * 2),
        ("UMT5EncoderModel", [{"relative_bias": (4, 13)}] * 2),
        ("MPNetModel", [{"relative_bias": (4, 257)}] * 2),
    ],
)
def test_no_mask_or_bias_is_formed(name, options, unpad, monkeypatch):
    model = make(name)
    calls = spy(monkeypatch, "attention_varlen" if unpad else "attention")
    inputs = batch(model)
    patch(model, unpad=unpad)(**inputs)
    assert len(calls) == len(options)
    for call, wanted in zip(calls, options, strict=True):
        assert call.get("mask") is None
        assert call.get("bias") is None
        assert {key: tuple(call[key].shape) if key == "relative_bias" else call.get(key) for key in wanted} == wanted


@pytest.mark.parametrize(
    "name", ["NomicBertModel", "ModernBertModel", "T5EncoderModel", "MPNetModel", "LlamaModel", "MistralModel"]
)
def test_holes_in_the_mask(name):
    model = make(name)
    model.pooler = None
    inputs = batch(model)
    inputs["attention_mask"] = torch.tensor([[1, 0, 1, 1, 0, 0, 1, 0, 1]] * 4)
    real = inputs["attention_mask"].bool()
    wanted = model(**inputs).last_hidden_state
    patch(model)
    if name in ("NomicBertModel", "LlamaModel"):  # their positions travel with the tokens
        assert tokens_computed(model, inputs) == (1, 20)
    else:
        with pytest.warns(UserWarning, match="holes"):
            assert tokens_computed(model, inputs) == (4, 9)
    torch.testing.assert_close(model(**inputs).last_hidden_state[real], wanted[real], **tolerance(name))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["ModernBertModel", "T5EncoderModel", "CLIPTextModel", "MistralModel"])
def test_checkpointing_replays_dropout(name, reentrant):
    dropout = {"T5EncoderModel": "dropout_rate"}.get(name, "attention_dropout")
    model = patch(make(name, **{dropout: 0.3}))
    inputs = batch(model)
    weight = torch.randn(4, 9, model.config.hidden_size, dtype=torch.float64) * inputs["attention_mask"][..., None]
    model.train()

    def step(seed):
        torch.manual_seed(seed)
        return gradients(model, (model(**inputs).last_hidden_state * weight).sum())

    wanted, other = step(0), step(1)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same_gradients(step(0), wanted)
    assert any((other[key] - wanted[key]).abs().max() > 1e-3 for key in wanted)


@pytest.mark.parametrize("name", ["T5EncoderModel", "UMT5EncoderModel", "MPNetModel", "SiglipTextModel"])
def test_replaced_methods(name):
    """Copies run their own weights, another implementation runs its own methods, and the signature stays."""
    model = make(name)
    inputs = batch(model, "left" if name == "SiglipTextModel" else "right")
    real = inputs["attention_mask"].bool()
    wanted = model(**inputs).last_hidden_state.detach()
    signature = inspect.signature(model.forward)
    patch(model)
    assert inspect.signature(model.forward) == signature
    other = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = "eager"
    torch.testing.assert_close(model(**inputs).last_hidden_state[real], wanted[real], **tolerance(name))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(other(**inputs).last_hidden_state[real], wanted[real], **tolerance(name))
    assert tokens_computed(other, inputs) == (1, sum(LENGTHS))
    unpatch(other)
    assert not any("forward" in vars(module) or "compute_bias" in vars(module) for module in other.modules())


def test_packed_input_of_your_own():
    """cu_seq_lens_q to models whose forward doesn't hand it down."""
    for name, offset in (("MPNetModel", 2), ("SiglipTextModel", 0)):
        model = make(name)
        inputs = batch(model, "left")
        real = inputs["attention_mask"].bool()
        wanted = [model(row[keep][None])[0][0] for row, keep in zip(inputs["input_ids"], real, strict=True)]
        packed = {
            "input_ids": inputs["input_ids"][real][None],
            "position_ids": torch.cat([torch.arange(n) for n in LENGTHS])[None] + offset,
            "cu_seq_lens_q": torch.tensor([0, *LENGTHS]).cumsum(0),
        }
        for unpad in (True, False):
            with patched(model, unpad=unpad):
                got = model(**packed).last_hidden_state[0]
            torch.testing.assert_close(got, torch.cat(wanted), **tolerance(name))


VISION = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION |= {"image_size": 16, "patch_size": 4, "initializer_range": 0.3}


@pytest.mark.parametrize("name", ["ViT", "CLIP", "Siglip"])
def test_images(name, monkeypatch):
    torch.manual_seed(0)
    if name == "ViT":
        config = transformers.ViTConfig(**VISION)
    else:
        text = {"CLIP": ENCODERS["CLIPTextModel"], "Siglip": ENCODERS["SiglipTextModel"]}[name]
        config = getattr(transformers, name + "Config")(text_config=text, vision_config=VISION, projection_dim=16)
    model = getattr(transformers, name + "Model")._from_config(config, attn_implementation="eager").double().eval()
    inputs = {"pixel_values": torch.randn(4, 3, 16, 16, dtype=torch.float64)}
    if name != "ViT":
        model.config.pad_token_id = 0
        inputs |= batch(model, "left" if name == "Siglip" else "right")

    def loss():
        out = model(**inputs)
        return out.logits_per_image.square().mean() if name != "ViT" else out.last_hidden_state.square().mean()

    wanted = gradients(model, loss())
    calls = spy(monkeypatch, "attention")
    packed = spy(monkeypatch, "attention_varlen")
    with patched(model):
        got = gradients(model, loss())
    assert (len(calls), len(packed)) == (2, 0 if name == "ViT" else 2)
    scale = max(g.abs().max().item() for g in wanted.values())
    assert_same_gradients(got, wanted, 2e-5, 2e-6 * max(1.0, scale))


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Qwen3ForSequenceClassification"])
def test_decoder_heads(name):
    torch.manual_seed(0)
    base = name.split("For")[0] + "Model"
    model_class = getattr(transformers, name)
    model = model_class._from_config(model_class.config_class(**DECODERS[base]), attn_implementation="sdpa")
    model = model.double().eval()
    for side in ("right", "left"):
        inputs = batch(model, side)
        real = inputs["attention_mask"].bool()
        wanted = model(**inputs).logits
        with patched(model):
            assert tokens_computed(model, inputs) == (1, sum(LENGTHS))
            got = model(**inputs).logits
            with pytest.warns(UserWarning, match="use_cache runs padded"):
                assert model(**inputs, use_cache=True).past_key_values.get_seq_length() == 9
        at = real if got.ndim == 3 else ...
        torch.testing.assert_close(got[at], wanted[at], rtol=2e-5, atol=2e-5)


def test_generation_with_a_patched_decoder():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**DECODERS["LlamaModel"])
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="sdpa").eval()
    inputs = batch(model, "left", lengths=(3, 5))
    wanted = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    with patched(model), pytest.warns(UserWarning, match="runs padded"):
        assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), wanted)


def test_compiled_model():
    model = make("ModernBertModel", torch.float32)
    inputs = batch(model)
    real = inputs["attention_mask"].bool()
    wanted = model(**inputs).last_hidden_state
    compiled = torch.compile(model, backend="eager", dynamic=True)
    compiled(**inputs)
    with patched(compiled):
        got = compiled(**inputs).last_hidden_state
        assert tokens_computed(model, inputs) == (1, sum(LENGTHS))
    torch.testing.assert_close(got[real], wanted[real], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(compiled(**inputs).last_hidden_state, wanted, rtol=1e-4, atol=1e-4)


WINDOWS = [
    ("ModernBertModel", [((2, 2), None), (None, None)]),
    ("LlamaModel", [(None, True)] * 2),
    ("MistralModel", [((2, 0), True)] * 2),
    ("Gemma3TextModel", [((2, 0), True), (None, True)]),
]


def windows(monkeypatch, name):
    """(window, causal) of each call, or its mask's shape: what a compiled call can note."""
    calls, original = [], getattr(interface, name)

    def noted(*args, **kwargs):
        mask = kwargs.get("mask")
        calls.append((kwargs.get("window"), kwargs.get("causal") or None) if mask is None else tuple(mask.shape))
        return original(*args, **kwargs)

    monkeypatch.setattr(interface, name, noted)
    return calls


@pytest.mark.parametrize(("name", "options"), WINDOWS)
def test_compiles_as_one_graph(name, options, monkeypatch):
    model = make(name, torch.float32)
    model.set_attn_implementation("embedkern")
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    calls = windows(monkeypatch, "attention")
    for lengths in (LENGTHS, (3, 6, 2)):
        inputs = batch(model, lengths=lengths)
        wanted = model(**inputs, use_cache=False).last_hidden_state
        calls.clear()
        torch.testing.assert_close(compiled(**inputs, use_cache=False).last_hidden_state, wanted, rtol=1e-5, atol=1e-5)
        assert calls == options


@pytest.mark.parametrize(("name", "options"), WINDOWS)
def test_compiled_packed_calls_form_no_mask(name, options, monkeypatch):
    model = make(name, torch.float32)
    inputs = batch(model)
    real = inputs["attention_mask"].bool()
    wanted = model(**inputs).last_hidden_state
    padded, packed = windows(monkeypatch, "attention"), windows(monkeypatch, "attention_varlen")
    compiled = torch.compile(patch(model), backend="eager", dynamic=True)
    torch.testing.assert_close(compiled(**inputs).last_hidden_state[real], wanted[real], rtol=1e-4, atol=1e-4)
    assert (padded, packed) == ([], options)


def test_window_changed_after_compiling():
    model = make("ModernBertModel", torch.float32)
    model.set_attn_implementation("embedkern")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    inputs = batch(model)
    for width in (4, 2):
        model.config.local_attention = width
        torch.testing.assert_close(compiled(**inputs)[0], model(**inputs)[0], rtol=1e-5, atol=1e-5)


def test_peft():
    peft = pytest.importorskip("peft")
    model = make("ModernBertModel")
    lora = peft.get_peft_model(model, peft.LoraConfig(target_modules=["Wqkv"], init_lora_weights=False))
    inputs = batch(model)
    real = inputs["attention_mask"].bool()
    wanted = lora(**inputs).last_hidden_state
    with patched(lora):
        assert tokens_computed(lora, inputs) == (1, sum(LENGTHS))
        torch.testing.assert_close(lora(**inputs).last_hidden_state[real], wanted[real], rtol=2e-5, atol=2e-5)
