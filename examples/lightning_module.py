"""Lightning: a training step that returns GradCache's loss; the Trainer's backward replays the chunks."""

import sys

import pytorch_lightning as pl
import torch
from common import Collate, Tower, encoder, mrr, read
from torch.utils.data import DataLoader

import embedkern as ek
from embedkern.nn import InfoNCELoss


class CodeSearch(pl.LightningModule):
    def __init__(self, model, learning_rate):
        super().__init__()
        self.tower = Tower(model)
        self.learning_rate = learning_rate
        self.loss = InfoNCELoss(temperature=0.05, learnable_temperature=True)
        self.cache = ek.GradCache([self.tower, self.tower], None, self.loss, chunk_tokens=2048, memory_budget=2e9)

    def training_step(self, batch, index):
        loss = self.cache(batch["queries"], batch["documents"])
        self.log("loss", loss.detach(), prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


def main(quick: bool = False) -> dict[str, float]:
    pl.seed_everything(0)
    train, test = read(quick)
    model = ek.patch(encoder(quick))
    before = mrr(model, test)
    loader = DataLoader(train, 32 if quick else 256, shuffle=True, drop_last=True, collate_fn=Collate(model))
    trainer = pl.Trainer(
        max_epochs=2 if quick else 1, accelerator="cpu", logger=False, enable_checkpointing=False, log_every_n_steps=1
    )
    trainer.fit(CodeSearch(model, 1e-3 if quick else 2e-4), loader)
    return {"before": before, "after": mrr(model, test)}


if __name__ == "__main__":
    print(main(quick="--quick" in sys.argv))
