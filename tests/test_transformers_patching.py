"""patch and unpatch: the way back, copies, wrappers, and what is refused."""

import copy
import inspect
import pickle
import warnings
from types import MethodType

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", minversion="5")

from transformers_cases import FAMILIES, LENGTHS, assert_same_gradients, batch, gradients, tiny, tokens_computed  # noqa: E402

from embedkern.transformers import patch, patched, unpatch  # noqa: E402


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
        "Olmo": (NotImplementedError, "family", lambda: transformers.OlmoModel(
            transformers.OlmoConfig(**small, intermediate_size=40))),
        "T5 with its decoder": (NotImplementedError, "decoder", lambda: transformers.T5Model(
            transformers.T5Config(vocab_size=60, d_model=32, d_kv=8, d_ff=40, num_layers=1, num_heads=2))),
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


@pytest.mark.parametrize(
    ("options", "error", "reason"),
    [
        ({"bidirectional": True}, ValueError, "no causal decoder"),
        ({"temperature": 0}, ValueError, "want > 0"),
        ({"temperature": [1.0]}, ValueError, "each of 2 layers"),
        ({"temperature": [1.0, -2.0]}, ValueError, "got -2.0"),
        ({"temperature": "warm"}, TypeError, "got str"),
        ({"temperature": torch.tensor(1.0)}, TypeError, "got Tensor"),
        ({"temperature": lambda lengths: lengths, "trainable_temperature": True}, ValueError, "starts from numbers"),
    ],
)
def test_bad_options(options, error, reason):
    model = tiny("Bert")
    with pytest.raises(error, match=reason):
        patch(model, **options)
    assert "_embedkern_patch" not in vars(model)
    assert model.config._attn_implementation == "eager"


def test_only_modules_are_patched():
    with pytest.raises(TypeError, match="torch.nn.Module"):
        patch("bert-base-uncased")
