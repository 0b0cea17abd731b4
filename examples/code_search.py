"""Code search: all-MiniLM-L6-v2 learns to find a function by its docstring, in batches of 256 pairs on a CPU.

The model runs on packed tokens, GradCache splits each batch by tokens and keeps the graphs that fit in 2 GB, and the
loss never forms the matrix of scores. One epoch takes the MRR among 500 functions from 0.468 to 0.530, in 6 minutes on
one core.
"""

import sys

import torch
from common import Collate, Tower, encoder, mrr, read
from torch.utils.data import DataLoader

import embedkern as ek


def main(quick: bool = False) -> dict[str, float]:
    torch.manual_seed(0)
    train, test = read(quick)
    model = ek.patch(encoder(quick)).eval()  # eval: without dropout
    before = mrr(model, test)
    tower = Tower(model)
    cache = ek.GradCache([tower, tower], None, ek.info_nce, chunk_tokens=2048, memory_budget=2e9)
    batch_size, epochs = (32, 3) if quick else (256, 1)
    loader = DataLoader(train, batch_size, shuffle=True, drop_last=True, collate_fn=Collate(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-4, total_steps=epochs * len(loader))
    for _ in range(epochs):
        for batch in loader:
            optimizer.zero_grad()
            loss = cache.cache_step(batch["queries"], batch["documents"], temperature=0.05)
            optimizer.step()
            schedule.step()
            print(f"loss {loss.item():.4f}")
    return {"before": before, "after": mrr(model, test)}


if __name__ == "__main__":
    print(main(quick="--quick" in sys.argv))
