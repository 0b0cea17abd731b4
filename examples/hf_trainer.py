"""transformers' plain Trainer: GradCache gives it a loss like any other, whose backward replays the chunks."""

import sys
from tempfile import TemporaryDirectory

from common import Collate, Tower, encoder, mrr, read
from transformers import Trainer, TrainingArguments

import embedkern as ek


class ContrastiveTrainer(Trainer):
    """Batches much larger than memory would hold: per_device_train_batch_size counts pairs, chunk_tokens memory."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        cache = ek.GradCache([model, model], None, ek.info_nce, chunk_tokens=2048, memory_budget=2e9)
        return cache(inputs["queries"], inputs["documents"], temperature=0.05)


def main(quick: bool = False) -> dict[str, float]:
    train, test = read(quick)
    model = ek.patch(encoder(quick))
    before = mrr(model, test)
    with TemporaryDirectory() as out:
        arguments = TrainingArguments(
            out,
            num_train_epochs=2 if quick else 1,
            per_device_train_batch_size=32 if quick else 256,
            learning_rate=1e-3 if quick else 2e-4,
            remove_unused_columns=False,  # the columns are Collate's, not forward's
            save_strategy="no",
            logging_steps=1,
            report_to="none",
            use_cpu=True,
        )
        trainer = ContrastiveTrainer(Tower(model), arguments, train_dataset=train, data_collator=Collate(model))
        trainer.train()
    return {"before": before, "after": mrr(model, test)}


if __name__ == "__main__":
    print(main(quick="--quick" in sys.argv))
