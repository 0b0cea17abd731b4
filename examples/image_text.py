"""Images and texts in one space: a small SigLIP, from nothing, on drawings of coloured shapes and their descriptions.

Both towers are patched; the sigmoid loss never forms the matrix of scores. Judged on 40
descriptions that it was never trained on: the right one of their new drawings has to be nearest. Recall goes from 0
to 1 in 20 seconds on one core.
"""

import itertools
import random
import sys

import torch
from torch import Tensor
from transformers import SiglipConfig, SiglipModel

import embedkern as ek
from embedkern.nn import SigmoidLoss

COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0), "white": (1, 1, 1)}
SHAPES = ("square", "circle", "cross", "frame")
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
WORDS = ("", *COLOURS, *SHAPES, *ROWS, *COLUMNS)
SIZE = 24  # pixels a side, three places of eight


def describe(colour: str, shape: str, row: str, column: str) -> Tensor:
    """Token ids, (4,), in an order that varies: "red square top left", "top left red square"."""
    words = [colour, shape, row, column]
    return torch.tensor([WORDS.index(word) for word in random.choice([words, words[2:] + words[:2]])])


def draw(colour: str, shape: str, row: str, column: str) -> Tensor:
    """(3, SIZE, SIZE), with noise and a little displacement."""
    i, j = torch.meshgrid(torch.arange(6) - 2.5, torch.arange(6) - 2.5, indexing="ij")
    inside = {
        "square": torch.ones(6, 6, dtype=torch.bool),
        "circle": i**2 + j**2 < 8,
        "cross": (i.abs() < 1) | (j.abs() < 1),
        "frame": (i.abs() > 2) | (j.abs() > 2),
    }[shape]
    top, left = (8 * names.index(name) + random.randrange(3) for names, name in ((ROWS, row), (COLUMNS, column)))
    image = 0.1 * torch.randn(3, SIZE, SIZE)
    image[:, top : top + 6, left : left + 6] += torch.tensor(COLOURS[colour])[:, None, None] * inside
    return image


def recall_at_1(model: SiglipModel, scenes: list[tuple[str, ...]]) -> float:
    with torch.no_grad():
        images, texts = embed(model, scenes)
    return ((texts @ images.T).argmax(1) == torch.arange(len(scenes))).float().mean().item()


def embed(model: SiglipModel, scenes: list[tuple[str, ...]]) -> tuple[Tensor, Tensor]:
    """Unit vectors of a drawing and of a description of each scene, both (B, C)."""
    images = model.get_image_features(pixel_values=torch.stack([draw(*scene) for scene in scenes]))
    texts = model.get_text_features(input_ids=torch.stack([describe(*scene) for scene in scenes]))
    return tuple(torch.nn.functional.normalize(out.pooler_output, dim=1) for out in (images, texts))


def main(quick: bool = False) -> dict[str, float]:
    torch.manual_seed(0)
    random.seed(0)
    scenes = list(itertools.product(COLOURS, SHAPES, ROWS, COLUMNS))
    random.shuffle(scenes)
    train, test = scenes[40:], scenes[:40]
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 128}
    config = SiglipConfig(
        text_config={
            **sizes,
            "vocab_size": len(WORDS),
            "bos_token_id": 0,
            "eos_token_id": 0,
            "max_position_embeddings": 4,
            "projection_size": 64,
        },
        vision_config={**sizes, "image_size": SIZE, "patch_size": 8},
    )
    model = ek.patch(SiglipModel(config))
    loss_function = SigmoidLoss(logit_bias=-4.0)  # its scale and bias are trained as well
    optimizer = torch.optim.AdamW([*model.parameters(), *loss_function.parameters()], lr=1e-3)
    before = recall_at_1(model, test)
    for step in range(80 if quick else 400):
        optimizer.zero_grad()
        loss = loss_function(*embed(model, random.sample(train, 70)))  # distinct, so that each has one match
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step}: loss {loss.item():.4f}")
    return {"before": before, "after": recall_at_1(model, test)}


if __name__ == "__main__":
    print(main(quick="--quick" in sys.argv))
