"""sentence-transformers' trainer, as its documentation has it. One import line is another.

all-MiniLM-L6-v2 learns to find a function by its docstring, with a cached loss over Matryoshka's prefixes.
"""

import sys
from tempfile import TemporaryDirectory

from common import encoder, read
from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.sentence_transformer.training_args import BatchSamplers

# from sentence_transformers.sentence_transformer import losses
from embedkern.sentence_transformers import losses


def main(quick: bool = False) -> dict[str, float]:
    train, test = read(quick)
    dataset = Dataset.from_dict({"query": [p.docstring for p in train], "code": [p.code for p in train]})
    keys = [str(i) for i in range(len(test))]
    evaluator = InformationRetrievalEvaluator(
        dict(zip(keys, (p.docstring for p in test), strict=True)),
        dict(zip(keys, (p.code for p in test), strict=True)),
        {key: {key} for key in keys},
        name="code",
        write_csv=False,
    )

    model = encoder(quick)
    loss = losses.CachedMultipleNegativesRankingLoss(model, mini_batch_num_tokens=2048)
    loss = losses.MatryoshkaLoss(model, loss, [384, 128, 32])
    before = evaluator(model)
    with TemporaryDirectory() as out:
        arguments = SentenceTransformerTrainingArguments(
            out,
            num_train_epochs=2 if quick else 1,
            per_device_train_batch_size=16 if quick else 256,
            batch_sampler=BatchSamplers.NO_DUPLICATES,
            learning_rate=1e-3 if quick else 2e-4,
            warmup_steps=0.1,
            save_strategy="no",
            logging_steps=1,
            report_to="none",
            use_cpu=True,
        )
        trainer = SentenceTransformerTrainer(model, arguments, train_dataset=dataset, loss=loss, evaluator=evaluator)
        trainer.train()
    after = evaluator(model)
    return {"before": before["code_cosine_mrr@10"], "after": after["code_cosine_mrr@10"]}


if __name__ == "__main__":
    print(main(quick="--quick" in sys.argv))
