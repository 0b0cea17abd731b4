"""patch's temperature: numbers, per layer, of the lengths, trainable."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5")

from transformers_cases import batch, gradients, tiny  # noqa: E402

from embedkern import log_length_temperature  # noqa: E402
from embedkern.transformers import export_temperature, patch, patched, unpatch  # noqa: E402


def hotter(model, temperatures):
    """The model whose queries are divided by the layers' temperatures: the same scores."""
    model = copy.deepcopy(model)
    for layer, temperature in zip(model.encoder.layer, temperatures, strict=True):
        for parameter in layer.attention.self.query.parameters():
            parameter.data /= temperature
    return model


@pytest.mark.parametrize("unpad", [True, False])
@pytest.mark.parametrize("temperature", [0.4, [0.4, 2.0]])
def test_numbers(temperature, unpad):
    model = tiny("Bert")
    inputs = batch(model)
    real = inputs["attention_mask"].bool()
    each = temperature if isinstance(temperature, list) else [temperature] * 2
    wanted = hotter(model, each)(**inputs).last_hidden_state
    plain = model(**inputs).last_hidden_state
    with patched(model, temperature=temperature, unpad=unpad):
        got = model(**inputs).last_hidden_state
    torch.testing.assert_close(got[real], wanted[real], rtol=1e-10, atol=1e-10)
    assert torch.equal(model(**inputs).last_hidden_state, plain)


@pytest.mark.parametrize("unpad", [True, False])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("by_head", [True, False])
def test_function_of_the_lengths(by_head, padded, unpad):
    model = tiny("Bert")
    inputs = batch(model, lengths=(5, 9, 2) if padded else (6, 6))
    heads = torch.tensor([0.5, 1.0, 1.5, 2.0], dtype=torch.float64)

    def of_lengths(lengths):
        temperature = log_length_temperature(lengths, 0.8).double()
        return temperature[:, 0, 0] * heads if by_head else temperature

    with patched(model, temperature=of_lengths, unpad=unpad):
        got = model(**inputs).last_hidden_state
    for row, mask, states in zip(inputs["input_ids"], inputs["attention_mask"], got, strict=True):
        n = int(mask.sum())
        wanted = copy.deepcopy(model)
        temperature = of_lengths(torch.tensor([n])).flatten().expand(4)
        for layer in wanted.encoder.layer:
            for parameter in layer.attention.self.query.parameters():
                parameter.data /= temperature.repeat_interleave(6).view(-1, *[1] * (parameter.ndim - 1))
        torch.testing.assert_close(states[:n], wanted(row[None, :n]).last_hidden_state[0], rtol=1e-8, atol=1e-8)


def test_function_of_the_lengths_is_checked():
    model = tiny("Bert")
    inputs = batch(model)
    with (
        patched(model, temperature=lambda lengths: lengths[:1].double()),
        pytest.raises(ValueError, match="want \\(B,\\)"),
    ):
        model(**inputs)
    band = torch.ones(4, 1, 9, 9, dtype=torch.bool)
    with (
        patched(model, temperature=lambda lengths: lengths.double()),
        pytest.raises(NotImplementedError, match="padding"),
    ):
        model(inputs["input_ids"], attention_mask=band)


@pytest.mark.parametrize("unpad", [True, False])
def test_trainable(unpad, tmp_path):
    model = tiny("Bert")
    inputs = batch(model)
    keys = list(model.state_dict())
    start = [0.5, 2.0]
    patch(model, temperature=start, trainable_temperature=True, unpad=unpad)
    names = [f"encoder.layer.{i}.attention.self.log_temperature" for i in range(2)]
    assert sorted(set(model.state_dict()) - set(keys)) == names
    model.double()
    loss = lambda: (model(**inputs).pooler_output ** 2).sum()  # noqa: E731
    got = gradients(model, loss())
    for name, layer in zip(names, model.encoder.layer, strict=True):
        parameter = layer.attention.self.log_temperature
        with torch.no_grad():
            parameter += 1e-5
            above = loss()
            parameter -= 2e-5
            below = loss()
            parameter += 1e-5
        torch.testing.assert_close(got[name], (above - below) / 2e-5, rtol=1e-6, atol=1e-8)
        assert got[name].abs() > 1e-4
    assert export_temperature(model) == pytest.approx(start)
    with torch.no_grad():
        model.encoder.layer[0].attention.self.log_temperature += 1
    trained = export_temperature(model)
    assert trained == pytest.approx([start[0] * 2.718281828, start[1]], rel=1e-6)
    wanted = model(**inputs).pooler_output
    model.save_pretrained(tmp_path)
    unpatch(model)
    assert list(model.state_dict()) == keys
    with patched(model, temperature=trained, unpad=unpad):
        torch.testing.assert_close(model(**inputs).pooler_output, wanted, rtol=1e-6, atol=1e-6)
    loaded = transformers.BertModel.from_pretrained(tmp_path, dtype=torch.float64).eval()
    torch.testing.assert_close(loaded(**inputs).pooler_output, model(**inputs).pooler_output, rtol=1e-10, atol=1e-10)


def test_export_without_a_trainable_temperature():
    model = tiny("Bert")
    with pytest.raises(ValueError, match="not patched"):
        export_temperature(model)
    with patched(model, temperature=0.5), pytest.raises(ValueError, match="trainable_temperature"):
        export_temperature(model)
