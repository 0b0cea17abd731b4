"""embedkern.sentence_transformers against sentence-transformers' own losses and modules."""

import copy
import inspect
import itertools
import json
import pickle
import random
import subprocess
import sys
import warnings

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("sentence_transformers", minversion="6")

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses as their_losses
from sentence_transformers.sentence_transformer import modules as their_modules
from sentence_transformers.util import cos_sim, dot_score, manhattan_sim
from sentence_transformers_cases import (  # noqa: F401  one_thread is a fixture
    DIM,
    ROWS,
    WORDS,
    assert_same,
    one_thread,
    sentence_transformer,
    texts,
    transformer_folder,
)

from embedkern import nn as ek_nn
from embedkern.sentence_transformers import losses, modules

ALL = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
NAMES = ("MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss", "GISTEmbedLoss", "CachedGISTEmbedLoss")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return transformer_folder(tmp_path_factory.mktemp("models") / "student", WORDS)


@pytest.fixture(scope="module")
def model(folder):
    return sentence_transformer(folder)


@pytest.fixture(scope="module")
def guide(tmp_path_factory):
    """Of another vocabulary."""
    return sentence_transformer(transformer_folder(tmp_path_factory.mktemp("models") / "guide", WORDS[::-1] + ["zz"]))


def embeddings(columns, dim=12, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    shared = torch.randn(ROWS, dim)
    return [(shared + torch.randn(ROWS, dim)).to(dtype).requires_grad_() for _ in range(columns)]


def in_parts(columns, size=3):
    """As the cached losses hold representations."""
    return [[x.detach().requires_grad_() for x in column.split(size)] for column in columns]


def run(loss, inputs):
    """The value and the gradients by embeddings, of either stage of a loss."""
    if hasattr(loss, "calculate_loss"):
        columns, *guides = (in_parts(each) for each in inputs)
        value = loss.calculate_loss(columns, *guides, with_backward=True)
        assert not value.requires_grad
        return value, [torch.cat([part.grad for part in column]) for column in columns]
    columns = [x.detach().requires_grad_() for x in inputs[0]]
    value = loss.compute_loss_from_embeddings(columns, None)
    return value.detach(), torch.autograd.grad(value, columns)


def train(loss, model, columns, seed=0):
    """The value and the gradients by parameters, from texts."""
    model.zero_grad()
    model.train()
    torch.manual_seed(seed)
    random.seed(seed)
    value = loss([model.preprocess(column) for column in columns], None)
    value.backward()
    return value.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def pair(name, *arguments, **options):
    return getattr(losses, name)(*arguments, **options), getattr(their_losses, name)(*arguments, **options)


@pytest.fixture
def calls(monkeypatch):
    """The calls of info_nce: what is equal to theirs because it is theirs doesn't count."""
    found = []
    info_nce = losses.info_nce

    def counted(*arguments, **options):
        found.append(options)
        return info_nce(*arguments, **options)

    monkeypatch.setattr(losses, "info_nce", counted)
    return found


@pytest.mark.parametrize("name", NAMES[:2])
@pytest.mark.parametrize(
    ("directions", "partition"),
    [
        (ALL[:1], "joint"), (ALL, "joint"), (("doc_to_doc", "query_to_doc", "query_to_doc"), "joint"),
        (("query_to_query", "query_to_doc"), "joint"), (("query_to_doc", "doc_to_query"), "per_direction"),
    ],
)  # fmt: skip
def test_ranking_is_theirs(name, directions, partition, model, calls):
    hardness = [(None, 0.0), ("in_batch_negatives", 2.0), ("hard_negatives", 3.0), ("all_negatives", 1.5)]
    for (mode, strength), similarity, columns in itertools.product(hardness, (cos_sim, dot_score), (2, 4)):
        ours, theirs = pair(
            name, model, scale=3.0, similarity_fct=similarity, directions=directions, partition_mode=partition,
            hardness_mode=mode, hardness_strength=strength,
        )  # fmt: skip
        calls.clear()
        assert_same(run(ours, [embeddings(columns)]), run(theirs, [embeddings(columns)]))
        assert len(calls) == 1


@pytest.mark.parametrize("columns", [2, 3, 4])
@pytest.mark.parametrize(("strategy", "margin"), [("absolute", 0.0), ("absolute", 0.2), ("relative", 0.3)])
def test_guided_is_theirs(strategy, margin, columns, model, calls):
    for anchors, positives in itertools.product((True, False), repeat=2):
        ours, theirs = pair(
            "CachedGISTEmbedLoss", model, model, temperature=0.1, margin_strategy=strategy, margin=margin,
            contrast_anchors=anchors, contrast_positives=positives,
        )  # fmt: skip
        inputs = [embeddings(columns), embeddings(columns, dim=7, seed=1)]
        calls.clear()
        assert_same(run(ours, inputs), run(theirs, inputs))
        assert len(calls) == (3 if columns > 2 and positives else 1)


def test_guided_with_a_small_temperature(model):
    """The exponentials of a row's loss don't fit float32."""
    ours, theirs = pair("CachedGISTEmbedLoss", model, model, temperature=0.004)
    columns = [x.detach() * torch.tensor([1.0, -1.0, 1.0])[i] for i, x in enumerate(embeddings(3))]
    inputs = [columns, [columns[0], columns[0] + 0.1, -columns[0]]]
    assert run(theirs, inputs)[0] > 100
    assert_same(run(ours, inputs), run(theirs, inputs))


def test_another_similarity_is_their_code(model, calls):
    for name in NAMES[:2]:
        ours, theirs = pair(name, model, similarity_fct=manhattan_sim, scale=0.5)
        assert_same(run(ours, [embeddings(3)]), run(theirs, [embeddings(3)]))
    # a negative margin lets a text meet itself
    ours, theirs = pair("CachedGISTEmbedLoss", model, model, margin=-0.5)
    inputs = [embeddings(3), embeddings(3, seed=1)]
    assert_same(run(ours, inputs), run(theirs, inputs))
    assert not calls


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("columns", [2, 3])
def test_from_texts(name, columns, model, guide, calls):
    """Dropout is on: the same seed draws the same."""
    arguments = (model, guide) if "GIST" in name else (model,)
    warm = {"temperature": 0.1} if "GIST" in name else {}  # their default multiplies rounding by 100
    for options in [{"mini_batch_size": 3}, {"mini_batch_num_tokens": 12}] if name.startswith("Cached") else [{}]:
        ours, theirs = pair(name, *arguments, **options, **warm)
        assert_same(train(ours, model, texts(columns)), train(theirs, model, texts(columns)))
        assert calls
        with torch.no_grad():  # an evaluator's call
            model.eval()
            features = [model.preprocess(column) for column in texts(columns)]
            assert_same(ours(features, None), theirs([dict(x) for x in features], None))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("per_step", [-1, 2])
def test_matryoshka(name, per_step, model, guide, calls):
    """Either library's wrapper with either's loss."""
    arguments = (model, guide) if "GIST" in name else (model,)
    options = {"similarity_fct": dot_score, "scale": 5.0} if "Ranking" in name else {"temperature": 0.1}

    def made(wrapper, library, **more):
        loss = getattr(library, name)(*arguments, **{**options, **more})
        return wrapper.MatryoshkaLoss(model, loss, [4, DIM, 8], [0.5, 1.0, 2.0], n_dims_per_step=per_step)

    wanted = train(made(their_losses, their_losses), model, texts(3))
    found = {}
    for wrapper, library in ((losses, losses), (losses, their_losses), (their_losses, losses)):
        calls.clear()
        assert_same(train(made(wrapper, library), model, texts(3)), wanted)
        found[wrapper, library] = len(calls)
    levels = 3 if per_step == -1 else 2
    assert found[losses, their_losses] == 0
    assert found[their_losses, losses] == levels * (3 if "GIST" in name else 1)
    assert found[losses, losses] == (3 * levels if "GIST" in name else 1)
    ours = made(losses, losses)
    assert ours.get_config_dict() == made(their_losses, their_losses).get_config_dict()
    if "Ranking" in name:
        calls.clear()
        ours, theirs = (made(w, w, similarity_fct=manhattan_sim) for w in (losses, their_losses))
        assert_same(train(ours, model, texts(3)), train(theirs, model, texts(3)))
        assert not calls


@pytest.mark.parametrize("similarity", [cos_sim, manhattan_sim])
@pytest.mark.parametrize("name", NAMES[:2])
def test_float32_under_autocast(name, similarity, model):
    loss = getattr(losses, name)(model, similarity_fct=similarity)
    half = embeddings(3, dtype=torch.bfloat16)
    wanted = run(getattr(their_losses, name)(model, similarity_fct=similarity), [[x.float() for x in half]])
    with torch.autocast("cpu", torch.bfloat16):
        value, gradients = run(loss, [half])
    assert value.dtype == torch.float32
    assert_same(value, wanted[0])
    for ours, theirs in zip(gradients, wanted[1], strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.float(), theirs, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("name", [*NAMES, "MatryoshkaLoss"])
def test_interface_is_theirs(name, model, guide):
    ours, theirs = getattr(losses, name), getattr(their_losses, name)
    assert inspect.signature(ours) == inspect.signature(theirs)
    assert issubclass(ours, theirs)
    arguments = (model, guide) if "GIST" in name else (model,)
    if name == "MatryoshkaLoss":
        arguments = (model, their_losses.MultipleNegativesRankingLoss(model), [DIM, 8])
    ours, theirs = ours(*arguments), theirs(*arguments)
    assert ours.get_config_dict() == theirs.get_config_dict()
    assert getattr(ours, "citation", None) == getattr(theirs, "citation", None)
    assert getattr(ours, "uses_gradient_cache", None) is getattr(theirs, "uses_gradient_cache", None)
    public = {key for key in dir(theirs) if not key.startswith("_")}
    assert public <= set(dir(ours))


def test_bad_arguments(model, guide):
    with pytest.raises(ValueError, match="Scale must be a positive"):
        losses.MultipleNegativesRankingLoss(model, scale=0.0)
    with pytest.raises(ValueError, match="Invalid directions"):
        losses.CachedMultipleNegativesRankingLoss(model, directions=("query_to_doc", "up"))
    with pytest.raises(ValueError, match="mini_batch_num_tokens must be"):
        losses.CachedGISTEmbedLoss(model, guide, mini_batch_num_tokens=0)
    with pytest.raises(ValueError, match="Expected 2 or 3 embeddings, got 4"):
        train(losses.GISTEmbedLoss(model, guide), model, texts(4))
    with pytest.raises(ValueError, match="at least 2 embeddings, got 1"):
        losses.MultipleNegativesRankingLoss(model).compute_loss_from_embeddings(embeddings(1), None)
    with pytest.raises(ValueError, match="as many, got 2 and 3"):
        losses.CachedGISTEmbedLoss(model, guide).calculate_loss(in_parts(embeddings(2)), in_parts(embeddings(3)))
    with pytest.raises(ValueError, match="cannot exceed"):
        losses.MatryoshkaLoss(model, losses.MultipleNegativesRankingLoss(model), [DIM + 1])


def _rank(rank, path, folder):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    model = sentence_transformer(folder)
    options = (
        {"directions": ALL, "hardness_mode": "all_negatives", "hardness_strength": 2.0},
        {"contrast_anchors": True},
    )
    for name, columns in itertools.product(("MultipleNegativesRankingLoss", *NAMES[1::2]), (2, 3)):
        guided = "GIST" in name
        ours, theirs = pair(name, *(model,) * (1 + guided), gather_across_devices=True, **options[guided])
        inputs = [embeddings(columns, seed=s + rank) for s in (0, 10)][: 1 + guided]
        (value, gradients), (wanted, wanted_gradients) = run(ours, inputs), run(theirs, inputs)
        assert_same(list(gradients), list(wanted_gradients))
        if not guided:  # ours is the mean of all ranks
            dist.all_reduce(wanted)
            wanted = wanted / 2
        assert_same(value, wanted)
    dist.destroy_process_group()


def test_gathered_across_devices(folder, tmp_path):
    torch.multiprocessing.spawn(_rank, (str(tmp_path / "store"), folder), nprocs=2)


MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")


def padded(side="right", dtype=torch.float32):
    mask = torch.arange(7) < torch.tensor([7, 3, 5])[:, None]
    mask = mask if side == "right" else mask.flip(1)
    return torch.randn(3, 7, DIM, dtype=dtype), mask.long()


@pytest.mark.parametrize("mode", [*MODES, MODES])
@pytest.mark.parametrize("prompt", [None, 2, torch.tensor([2])])
def test_pooling_is_theirs(mode, prompt):
    ours, theirs = (m.Pooling(DIM, mode, include_prompt=prompt is None) for m in (modules, their_modules))
    assert ours.get_config_dict() == theirs.get_config_dict()
    assert ours.get_embedding_dimension() == theirs.get_embedding_dimension()
    more = {} if prompt is None else {"prompt_length": prompt}
    for side in ("right", "left"):
        hidden, mask = padded(side)
        x, y = (hidden.clone().requires_grad_() for _ in range(2))
        found = ours({"token_embeddings": x, "attention_mask": mask, **more})["sentence_embedding"]
        wanted = theirs({"token_embeddings": y, "attention_mask": mask, **more})["sentence_embedding"]
        assert_same(found, wanted)
        weight = torch.randn_like(wanted)
        assert_same(torch.autograd.grad((found * weight).sum(), x), torch.autograd.grad((wanted * weight).sum(), y))
        poisoned = hidden.masked_fill(mask[..., None] == 0, torch.nan)
        assert_same(ours({"token_embeddings": poisoned, "attention_mask": mask, **more})["sentence_embedding"], wanted)
    flat = {"token_embeddings": hidden[mask.bool()][None], "cu_seq_lens_q": torch.tensor([0, 7, 10, 15]), **more}
    assert_same(ours(dict(flat))["sentence_embedding"], theirs(dict(flat))["sentence_embedding"])
    assert_same(ours({"token_embeddings": hidden, **more})["sentence_embedding"],
                theirs({"token_embeddings": hidden, **more})["sentence_embedding"])  # fmt: skip


def test_nothing_to_pool_gives_zeros():
    ours = modules.Pooling(DIM, MODES, include_prompt=False)
    hidden = torch.full((2, 4, DIM), torch.nan)
    empty = ours({"token_embeddings": hidden, "attention_mask": torch.zeros(2, 4, dtype=torch.int64)})
    assert torch.equal(empty["sentence_embedding"], torch.zeros(2, 6 * DIM))
    prompt = ours({"token_embeddings": torch.randn(2, 4, DIM), "prompt_length": 4})
    assert torch.equal(prompt["sentence_embedding"], torch.zeros(2, 6 * DIM))
    flat = {"token_embeddings": hidden[:1, :0], "cu_seq_lens_q": torch.tensor([0, 0, 0])}
    assert torch.equal(ours(flat)["sentence_embedding"], torch.zeros(2, 6 * DIM))


def test_pooling_of_other_modules_results():
    for mode, key in (("mean", "token_weights_sum"), ("cls", "cls_token_embeddings")):
        hidden, mask = padded()
        more = {key: torch.rand(3) if key == "token_weights_sum" else torch.randn(3, DIM)}
        found, wanted = (
            m.Pooling(DIM, mode)({"token_embeddings": hidden, "attention_mask": mask, **more})["sentence_embedding"]
            for m in (modules, their_modules)
        )
        assert_same(found, wanted)


def test_pooling_arguments():
    with pytest.warns(FutureWarning, match="deprecated"):
        old = modules.Pooling(DIM, pooling_mode_cls_token=True, pooling_mode_mean_tokens=False)
    assert old.pooling_mode == "cls"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert modules.Pooling(word_embedding_dimension=DIM).embedding_dimension == DIM
    with pytest.raises(ValueError, match="Invalid pooling mode: 'sum'"):
        modules.Pooling(DIM, "sum")
    assert inspect.signature(modules.Pooling) == inspect.signature(their_modules.Pooling)


LOAD = """
import sys
sys.modules["embedkern"] = None  # an import of it raises
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], device="cpu")
print(type(model[1]).__module__, model.encode(["a bb", "c"]).tolist())
"""


def test_saved_pooling_loads_without_embedkern(folder, tmp_path):
    model = sentence_transformer(folder, modules.Pooling)
    for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(same[1]) is modules.Pooling
        assert same[1].get_config_dict() == model[1].get_config_dict()
    model.save(str(tmp_path))
    done = subprocess.run([sys.executable, "-c", LOAD, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    module, values = done.stdout.strip().split("\n")[-1].split(" ", 1)
    assert module.startswith("sentence_transformers.")
    assert_same(torch.tensor(json.loads(values)), torch.tensor(model.encode(["a bb", "c"])))


SIZES = {"num_latents": 6, "num_heads": 2, "head_dim": 8, "ff_mult": 2}


@pytest.mark.parametrize("name", ["LatentAttentionPooling", "MultiLayerPooling"])
def test_trained_poolings(name, folder, tmp_path):
    ours, plain = getattr(modules, name), getattr(ek_nn, name)
    assert inspect.signature(ours).parameters.keys() == inspect.signature(plain).parameters.keys()
    sizes = {**SIZES, "num_layers": 2} if name == "MultiLayerPooling" else SIZES
    module = ours(hidden_size=DIM, **sizes)
    plain = plain(hidden_size=DIM, **sizes)
    state = {key.removeprefix("pooling."): x for key, x in module.state_dict().items()}
    plain.load_state_dict(state)

    hidden, mask = padded()
    layers = [torch.randn_like(hidden), torch.randn_like(hidden), hidden]
    of_layers = name == "MultiLayerPooling"
    wanted = plain(layers if of_layers else hidden, mask=mask.bool())
    features = {"token_embeddings": hidden, "all_layer_embeddings": tuple(layers), "attention_mask": mask}
    assert_same(module(features)["sentence_embedding"], wanted)
    real = mask.bool()
    flat = {"token_embeddings": hidden[real][None], "all_layer_embeddings": [x[real][None] for x in layers],
            "cu_seq_lens_q": torch.tensor([0, 7, 10, 15])}  # fmt: skip
    assert_same(module(flat)["sentence_embedding"], wanted)
    if of_layers:
        with pytest.raises(ValueError, match="num_layers = 2 tensors, got none"):
            module({"token_embeddings": hidden, "attention_mask": mask})

    transformer = their_modules.Transformer(folder, config_kwargs={"output_hidden_states": True})
    model = SentenceTransformer(modules=[transformer, module], device="cpu")
    assert model.get_embedding_dimension() == DIM
    model.save(str(tmp_path))
    loaded = SentenceTransformer(
        str(tmp_path), device="cpu", trust_remote_code=True, config_kwargs={"output_hidden_states": True}
    )
    assert type(loaded[1]) is ours
    assert loaded[1].get_config_dict() == module.get_config_dict()
    assert_same(torch.tensor(loaded.encode(["a bb", "c"])), torch.tensor(model.encode(["a bb", "c"])))
