"""patch on the families beyond BERT's relatives, against transformers' own attention."""

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5")

from transformers_cases import LENGTHS, assert_same_gradients, batch, gradients, tokens_computed  # noqa: E402

from embedkern.transformers import patch, patched, unpatch  # noqa: E402

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
    "Gemma3TextModel": COMMON | GROUPED | MIXED | {"head_dim": 8, "sliding_window": 3, "query_pre_attn_scalar": 8},
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


@pytest.mark.parametrize("bidirectional", [None, True])
@pytest.mark.parametrize("name", [*ENCODERS, *DECODERS])
def test_hidden_states_and_gradients_equal_eager(name, bidirectional):
    if bidirectional and name not in DECODERS:
        pytest.skip("an encoder is bidirectional already")
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
