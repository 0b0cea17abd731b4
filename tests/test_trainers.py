"""sentence-transformers' own trainer with embedkern's losses, poolings and patch: what it trains and what it saves."""

import gc
import os
import random
import socket

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("datasets", reason="the examples' extra isn't installed")
pytest.importorskip("accelerate", reason="the examples' extra isn't installed")

import datasets
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer import losses as their_losses
from sentence_transformers.sentence_transformer import modules as their_modules
from sentence_transformers.sentence_transformer.evaluation import TripletEvaluator
from sentence_transformers_cases import (  # noqa: F401  one_thread is a fixture
    DIM,
    WORDS,
    assert_same,
    one_thread,
    sentence_transformer,
    texts,
    transformer_folder,
)
from transformers_cases import tokens_computed

from embedkern.sentence_transformers import losses, modules
from embedkern.transformers import patch, patched, unpatch

OURS, THEIRS = (losses, modules), (their_losses, their_modules)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return transformer_folder(tmp_path_factory.mktemp("models") / "student", WORDS)


def dataset(columns=3):
    return datasets.Dataset.from_dict(dict(zip(("anchor", "positive", "negative"), texts(columns), strict=False)))


def train(model, loss, out, resume=None, **options):
    """The trainer after two epochs of two steps. SGD: Adam makes a step out of the rounding of a gradient of zero."""
    settings = {"num_train_epochs": 2, "learning_rate": 0.1, "per_device_train_batch_size": 4, "save_strategy": "no"}
    arguments = SentenceTransformerTrainingArguments(
        out, use_cpu=True, report_to="none", disable_tqdm=True, logging_steps=1, optim="sgd", **{**settings, **options}
    )
    random.seed(0)  # MatryoshkaLoss draws from it
    trainer = SentenceTransformerTrainer(
        model, arguments, train_dataset=dataset(), eval_dataset=dataset(), loss=loss,
        evaluator=TripletEvaluator(*texts(3, seed=1)),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(model):
    return {name: x.detach().clone() for name, x in model.state_dict().items()}


def assert_learned(model, folder):
    before = weights(sentence_transformer(folder))
    assert sum(not torch.equal(x, before[name]) for name, x in weights(model).items() if name in before) > 30


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def ranking(library, model):
    return library.MultipleNegativesRankingLoss(model, scale=10.0, directions=("query_to_doc", "doc_to_query"))


def cached(library, model):
    return library.CachedMultipleNegativesRankingLoss(model, scale=10.0, mini_batch_num_tokens=10)


def matryoshka(library, model):
    return library.MatryoshkaLoss(model, cached(library, model), [DIM, 8, 4], n_dims_per_step=2)


def guided(library, model):
    guide = SentenceTransformer(modules=list(model), device="cpu")  # the tokenizer and weights of the student
    return library.CachedGISTEmbedLoss(model, guide, temperature=0.1, mini_batch_size=3)


@pytest.mark.parametrize("make", [ranking, cached, matryoshka, guided])
def test_training_is_theirs(make, folder, tmp_path):
    """Losses logged, evaluation, prompts left out of the pooling, and the weights at the end."""
    options = {"prompts": {"anchor": "a bb: ", "positive": "c: "}, "warmup_steps": 1, "weight_decay": 0.1}
    found = []
    for losses_, modules_ in (OURS, THEIRS):
        model = sentence_transformer(folder, modules_.Pooling)
        model.set_pooling_include_prompt(False)
        trainer = train(model, make(losses_, model), tmp_path, **options)
        assert_learned(model, folder)
        logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        found.append((logged, weights(model), trainer.evaluate()))
    (logged, ours, metrics), (their_logged, theirs, their_metrics) = found
    assert len(logged) == 4
    assert logged == pytest.approx(their_logged, rel=1e-4)
    assert_same(ours, theirs)
    for name in ("eval_loss", "eval_cosine_accuracy"):
        assert metrics[name] == pytest.approx(their_metrics[name], rel=1e-4)


@pytest.mark.parametrize(("checkpointing", "accumulate"), [(False, 2), (True, 1)])
def test_patched_model_trains_the_same(checkpointing, accumulate, folder, tmp_path):
    options = {"gradient_checkpointing": checkpointing, "gradient_accumulation_steps": accumulate}
    plain = without_dropout(sentence_transformer(folder))
    train(plain, cached(losses, plain), tmp_path, **options)
    model = without_dropout(sentence_transformer(folder, modules.Pooling))
    with patched(model):
        trainer = train(model, cached(losses, model), tmp_path, **options)
        features = model.preprocess(texts(1)[0])
        assert tokens_computed(model, {"input": features}) == (1, int(features["attention_mask"].sum()))
    assert_learned(model, folder)
    assert_same(weights(model), weights(plain))
    assert trainer.evaluate()["eval_loss"] > 0


@pytest.mark.parametrize("pooling", [modules.Pooling, modules.LatentAttentionPooling])
def test_checkpoint_resumes(pooling, folder, tmp_path):
    """While patched: the run continued from the checkpoint ends where the whole one does."""

    def made():
        if pooling is modules.Pooling:
            return patch(sentence_transformer(folder, pooling))
        torch.manual_seed(0)
        sizes = {"hidden_size": DIM, "num_latents": 4, "num_heads": 2, "head_dim": 8}
        return patch(sentence_transformer(folder, lambda width: pooling(**sizes)))

    model = made()
    options = {"save_strategy": "steps", "save_steps": 2}
    train(model, ranking(losses, model), tmp_path, **options)
    continued = made()
    train(continued, ranking(losses, continued), tmp_path, resume=str(tmp_path / "checkpoint-2"), **options)
    assert_same(weights(continued), weights(model), 0.0)
    saved = SentenceTransformer(str(tmp_path / "checkpoint-4"), device="cpu", trust_remote_code=True)
    assert saved[0].model.config._attn_implementation != "embedkern"
    sentences = texts(1)[0]
    assert_same(torch.tensor(saved.encode(sentences)), torch.tensor(unpatch(model).encode(sentences)))


def test_adapter(folder, tmp_path):
    """LoRA by PEFT itself: only it is trained and saved, patched or not the same, and it loads onto the base model."""
    peft = pytest.importorskip("peft")
    found = []
    for apply in (patch, lambda model: model):
        model = without_dropout(sentence_transformer(folder, modules.Pooling))
        torch.manual_seed(0)
        lora = peft.LoraConfig(target_modules=["query", "value"], r=2, init_lora_weights=False)
        model[0].model = peft.get_peft_model(model[0].model, lora)
        before = weights(model)
        train(apply(model), cached(losses, model), tmp_path)
        found.append(weights(model))
        changed = {name for name, x in weights(model).items() if not torch.equal(x, before[name])}
        assert len(changed) == 8
        assert all("lora_" in name for name in changed)
    assert_same(*found)
    model.save(str(tmp_path / "adapter"))
    patch(model)
    model.save(str(tmp_path / "patched"))
    files = [{f.name: f.read_bytes() for f in (tmp_path / n).glob("*.safetensors")} for n in ("adapter", "patched")]
    assert files[0] == files[1]
    assert files[0].keys() == {"adapter_model.safetensors"}
    loaded = sentence_transformer(folder, modules.Pooling)
    loaded[0].model = peft.PeftModel.from_pretrained(loaded[0].model, tmp_path / "patched")
    sentences = texts(1)[0]
    assert_same(torch.tensor(loaded.encode(sentences)), torch.tensor(model.encode(sentences)))


def _trained(library, folder, out):
    losses_, modules_ = library
    model = without_dropout(sentence_transformer(folder, modules_.Pooling))
    loss = losses_.CachedMultipleNegativesRankingLoss(model, scale=10.0, mini_batch_size=2, gather_across_devices=True)
    if library is OURS:
        patch(model)
    trainer = train(model, loss, out, per_device_train_batch_size=2, ddp_backend="gloo")
    assert trainer.args.world_size == 2
    assert_learned(model, folder)
    return weights(model)


def _rank(rank, port, folder, out):
    """One of two processes, each with half of every batch."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", **where)
    torch.set_num_threads(1)
    ours, theirs = (_trained(library, folder, out) for library in (OURS, THEIRS))
    assert_same(ours, theirs)
    for name, x in ours.items():
        of_first = x.clone()
        dist.broadcast(of_first, 0)
        assert torch.equal(x, of_first), name
    gc.collect()  # a DDP module that outlives its process group waits for ever
    dist.destroy_process_group()


def test_gathered_across_devices(folder, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_rank, (port, folder, str(tmp_path)), nprocs=2)
