"""Accelerate: one process or several (`accelerate launch accelerate_loop.py`), each with its part of a batch.

The documents of every process are the negatives of all; DDP synchronises once a step.
"""

import sys

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from common import Collate, Tower, encoder, mrr, read
from torch.utils.data import DataLoader

import embedkern as ek


def main(quick: bool = False) -> dict[str, float]:
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    train, test = read(quick)
    model = ek.patch(encoder(quick)).eval()  # eval: without dropout
    before = mrr(model, test)
    batch_size, epochs = (32, 2) if quick else (256, 1)
    loader = DataLoader(
        train,
        batch_size // accelerator.num_processes,
        shuffle=True,
        generator=torch.Generator().manual_seed(0),  # the same batches for any number of processes
        drop_last=True,
        collate_fn=Collate(model),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3 if quick else 2e-4)
    tower, optimizer, loader = accelerator.prepare(Tower(model), optimizer, loader)
    cache = ek.GradCache([tower, tower], None, ek.info_nce, chunk_tokens=2048, memory_budget=2e9)
    group = dist.group.WORLD if accelerator.num_processes > 1 else None
    for _ in range(epochs):
        for batch in loader:
            optimizer.zero_grad()
            loss = cache(batch["queries"], batch["documents"], temperature=0.05, group=group)
            # info_nce's gradient is that of the mean over all processes, and DDP divides by their number once more.
            accelerator.backward(loss * accelerator.num_processes)
            norm = accelerator.clip_grad_norm_(tower.parameters(), 1.0)
            optimizer.step()
            accelerator.print(f"loss {loss.item():.4f}, gradient {norm.item():.4f}")
    after = mrr(model, test)
    accelerator.end_training()
    return {"before": before, "after": after}


if __name__ == "__main__":
    found = main(quick="--quick" in sys.argv)
    PartialState().print(found)
