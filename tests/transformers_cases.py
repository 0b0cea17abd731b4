"""Small random transformers models and padded batches, shared by the tests of embedkern.transformers."""

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", minversion="5")

FAMILIES = ("Bert", "Roberta", "XLMRoberta", "Camembert", "DistilBert", "Electra", "Albert")
WIDTHS = {
    # Head dim 6: padded to 8 on the way in. A wide initialisation, so that attention is far from uniform.
    "vocab_size": 60,
    "hidden_size": 24,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 12,
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
    linear = next(m for n, m in model.named_modules() if isinstance(m, nn.Linear) and ("layer" in n or "block" in n))
    handle = linear.register_forward_hook(lambda module, args, out: seen.append(args[0].shape[:2]))
    model(**inputs)
    handle.remove()
    return tuple(seen[0])
