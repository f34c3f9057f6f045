"""Train the small Mixture-of-Experts chat model that ships as a demo, on a CPU, in about an hour.

    python examples/train_demo_model.py OUT [--minutes 60] [--family qwen3_moe|olmoe] [--layers 6] [--seed 0]
        [--device cpu|cuda]

The text is Python's own standard library and documentation (see demo_corpus.py), so nothing is downloaded. OUT becomes
a Hugging Face checkpoint folder: one tensor per expert in bfloat16, tokenizer with chat template, the held-out text
(heldout.txt) and training.json with the held-out perplexity beside a unigram and a 5-gram baseline. The learning rate
follows the wall clock, so a slower machine gives a weaker model rather than a longer run. A run that was cut off goes
on from OUT/checkpoint.pt when it is started again; the file goes away once the run is complete.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __name__ == "__main__" and "MALLOC_TRIM_THRESHOLD_" not in os.environ:
    # Every step frees and takes back a gigabyte of activations: kept inside the process, its pages fault in only once.
    # oneDNN builds a kernel for each matrix shape, and the experts' row count varies from batch to batch.
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 36)}
    os.environ |= {"MALLOC_ARENA_MAX": "1", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8192"}
    # Where others use the machine too, a thread that waits long for its fellow must not burn the core it waits for.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    os.execv(sys.executable, [sys.executable, *sys.argv])

import numpy as np
import torch
import torch.nn.functional as F
from demo_corpus import END_OF_TEXT, END_OF_TURN, Corpus, build_corpus, ngram_perplexities
from demo_model import Model, Shape, hf_tensors, token_loss
from safetensors.torch import save_file
from torch import nn

MIX = {"library": 0.42, "tests": 0.22, "dialogues": 0.36}  # share of the rows of a batch
TOKENS = 8192  # per step
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


class Muon(torch.optim.Optimizer):
    """Momentum whose step is made orthogonal (Newton-Schulz), for stacks of matrices; needs fewer steps than AdamW.

    The step is scaled to the size of AdamW's, so that both take the same learning rate and weight decay.
    """

    def __init__(self, parameters: list[nn.Parameter], lr: float, decay: float = 0.1) -> None:
        super().__init__(parameters, {"lr": lr, "decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 0.05)
                x = p.grad.lerp(momentum, 0.95).bfloat16().view(-1, *p.shape[-2:])
                x = x.mT if (tall := p.shape[-2] > p.shape[-1]) else x
                x = x / (x.float().norm(dim=(-2, -1), keepdim=True) + 1e-7).bfloat16()
                for _ in range(5):
                    a = x @ x.mT
                    x = torch.baddbmm(x, torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
                x = (x.mT if tall else x).reshape(p.shape)
                p.mul_(1 - group["lr"] * group["decay"]).add_(x, alpha=-group["lr"] * 0.2 * max(p.shape[-2:]) ** 0.5)


def make_optimizers(model: Model, lr: float) -> list[torch.optim.Optimizer]:
    named = dict(model.named_parameters())
    matrices = [p for n, p in named.items() if n.endswith(("qkv", ".o", "gate_up", "down"))]
    tables = [p for n, p in named.items() if n.endswith(("embed", "router"))]
    norms = [p for p in named.values() if not any(p is q for q in matrices + tables)]
    groups = [{"params": tables, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    return [Muon(matrices, lr), torch.optim.AdamW(groups, lr, betas=(0.9, 0.95), fused=True)]


def batch_rows(corpus: Corpus, rows: int, length: int, seed: list[int]) -> np.ndarray:
    """Rows of length + 1 tokens: from anywhere in a file, or from the start of a dialogue (as a chat begins)."""
    rng, out = np.random.default_rng(seed), np.empty((rows, length + 1), np.int64)
    for i, kind in enumerate(rng.choice(list(MIX), rows, p=list(MIX.values()))):
        if kind == "dialogues":
            tokens = corpus.dialogues
            start = min(rng.choice(corpus.starts), len(tokens) - length - 1)
        else:
            tokens = corpus.text[kind]
            start = rng.integers(len(tokens) - length)
        out[i] = tokens[start : start + length + 1]
    return out


@torch.no_grad()
def token_losses(model: Model, tokens: np.ndarray, rows: int, length: int) -> np.ndarray:
    """Loss of each of tokens[1:], each with at least length // 2 tokens before it where there are as many."""
    device, half, losses = model.embed.device, length // 2, []
    starts = list(range(0, max(len(tokens) - 1 - half, 1), half))
    padded = np.concatenate([tokens.astype(np.int64), np.zeros(length + 1, np.int64)])
    model.eval()
    for i in range(0, len(starts), rows):
        some = (starts[i : i + rows] + [0] * rows)[:rows]  # always full, since a new shape means compiling again
        ids = torch.from_numpy(np.stack([padded[at : at + length + 1] for at in some])).to(device)
        loss = token_loss(model(ids[:, :-1])[0].flatten(0, 1), ids[:, 1:].flatten()).view(rows, length).cpu().numpy()
        losses += [loss[j] if at == 0 else loss[j, half:] for j, at in enumerate(starts[i : i + rows])]
    model.train()
    return np.concatenate(losses)[: len(tokens) - 1]


def train(corpus: Corpus, shape: Shape, args: argparse.Namespace) -> tuple[Model, dict[str, float]]:
    torch.manual_seed(args.seed)
    model = Model(shape).to(args.device)
    optimizers = make_optimizers(model, args.lr)
    done = {"step": 0, "tokens": 0, "seconds": 0.0}
    checkpoint = args.out / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=args.device, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        done = saved["done"]
    budget, last_saved, begun = args.minutes * 60, done["seconds"], time.monotonic() - done["seconds"]
    while (spent := done["seconds"] / budget) < 1:
        rate = args.lr * min(1.0, (spent + 1e-3) / 0.03, (1 - spent) / 0.97)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        # Short rows while the model learns local structure, since attention is a third of the time at full length.
        length = 512 if spent < 0.7 else 1024
        rows = batch_rows(corpus, TOKENS // length, length, [args.seed, int(done["step"])])
        ids = torch.from_numpy(rows).to(args.device)
        logits, balance = model(ids[:, :-1])
        loss = token_loss(logits.flatten(0, 1), ids[:, 1:].flatten()).mean()
        (loss + 0.01 * balance).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=False)  # keeps their memory
        done = {"step": done["step"] + 1, "tokens": done["tokens"] + TOKENS, "seconds": time.monotonic() - begun}
        if done["step"] % 20 == 0:
            speed = done["tokens"] / done["seconds"]
            state = f"loss {loss.item():.3f}  balance {balance.item():.3f}  lr {rate:.1e}  {speed:.0f} tokens/s"
            print(f"{done['seconds']:6.0f} s  step {done['step']:5d}  {state}", flush=True)
        if done["seconds"] - last_saved > 240 or done["seconds"] >= budget:
            last_saved = done["seconds"]
            states = [optimizer.state_dict() for optimizer in optimizers]
            new = checkpoint.with_suffix(".new")  # so that a run cut off while saving keeps the one before
            torch.save({"model": model.state_dict(), "optimizers": states, "done": done}, new)
            new.replace(checkpoint)
            sample = token_losses(model, corpus.heldout[:32768], TOKENS // 1024, 1024)
            print(f"{done['seconds']:6.0f} s  held-out sample: perplexity {math.exp(sample.mean()):.2f}", flush=True)
    return model, done


def export(model: Model, corpus: Corpus, out: Path) -> None:
    s, ids = model.s, {token: corpus.tokenizer.token_to_id(token) for token in (END_OF_TEXT, END_OF_TURN)}
    stop = [ids[END_OF_TURN], ids[END_OF_TEXT]]
    config = {
        "architectures": ["Qwen3MoeForCausalLM" if s.family == "qwen3_moe" else "OlmoeForCausalLM"],
        "model_type": s.family,
        "vocab_size": s.vocab,
        "hidden_size": s.hidden,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "num_key_value_heads": s.kv_heads,
        "num_experts": s.experts,
        "num_experts_per_tok": s.top_k,
        "intermediate_size": s.expert_width,
        "norm_topk_prob": not s.whole_norm,
        "hidden_act": "silu",
        "max_position_embeddings": s.max_positions,
        "rms_norm_eps": 1e-6,
        "rope_theta": s.rope_theta,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": stop,
        "pad_token_id": ids[END_OF_TEXT],
        "torch_dtype": "bfloat16",
    }
    if s.family == "qwen3_moe":
        config |= {"head_dim": s.head_dim, "moe_intermediate_size": s.expert_width, "decoder_sparse_step": 1}
        config |= {"mlp_only_layers": [], "use_sliding_window": False}
    sampling = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "top_k": 40, "max_new_tokens": 256}
    generation = {"eos_token_id": stop, "pad_token_id": ids[END_OF_TEXT], **sampling}
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TURN,
        "pad_token": END_OF_TEXT,
        "model_max_length": s.max_positions,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    files = {"config": config, "generation_config": generation, "tokenizer_config": tokenizer}
    for name, content in files.items():
        (out / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    corpus.tokenizer.save(str(out / "tokenizer.json"))
    (out / "heldout.txt").write_text(corpus.heldout_text)
    save_file(hf_tensors(model), out / "model.safetensors", {"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # written for its owner alone otherwise


def check_with_transformers(model: Model, corpus: Corpus, out: Path) -> dict[str, float]:
    """Compare with the same checkpoint run by transformers in float32, and print what it answers in a chat."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    reference: Any = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(out)
    ids = torch.from_numpy(corpus.heldout[:513].astype(np.int64))[None]
    model.eval()
    with torch.no_grad():
        ours, theirs = model(ids[:, :-1].to(model.embed.device))[0][0].float().cpu(), reference(ids[:, :-1]).logits[0]
    targets = ids[0, 1:]
    report = {
        "loss_here": F.cross_entropy(ours, targets).item(),
        "loss_transformers": F.cross_entropy(theirs, targets).item(),
        "logits_relative_error": ((ours - theirs).norm() / theirs.norm()).item(),
        "same_best_token": (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item(),
    }
    assert abs(report["loss_here"] - report["loss_transformers"]) < 0.03, report
    assert corpus.tokenizer.encode("import os\n").ids == tokenizer("import os\n")["input_ids"]
    for ask in ("import os", "def read_lines(path):", "What does os.path.join do?", "document: lambda", "Hello"):
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": ask}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        torch.manual_seed(0)
        answer = reference.generate(**chat, max_new_tokens=400)[0, chat["input_ids"].shape[1] :]
        print(f"--- {ask}\n{tokenizer.decode(answer)}", flush=True)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=60.0, help="time for training alone; the rest takes about 3")
    parser.add_argument("--family", choices=["qwen3_moe", "olmoe"], default="qwen3_moe")
    parser.add_argument("--layers", type=int, default=Shape.layers)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    # Two row lengths, training or not, queries or keys: each is compiled by itself, and the default limit is 8.
    torch._dynamo.config.recompile_limit = 64

    shape = Shape(family=args.family, layers=args.layers)
    corpus = build_corpus(shape.vocab, args.seed)
    sizes = {kind: len(tokens) for kind, tokens in corpus.text.items()} | {"dialogues": len(corpus.dialogues)}
    print(f"training tokens {sizes}, held out {len(corpus.heldout)}", flush=True)
    model, done = train(corpus, shape, args)
    export(model, corpus, args.out)

    tokens = corpus.heldout
    bits_per_byte = len(tokens) / len(corpus.heldout_text.encode()) / math.log(2)
    perplexities = {"model": math.exp(token_losses(model, tokens, TOKENS // 1024, 1024).mean())}
    perplexities |= ngram_perplexities(np.concatenate(list(corpus.text.values())), tokens, shape.vocab)
    table = {name: {"perplexity": p, "bits_per_byte": math.log(p) * bits_per_byte} for name, p in perplexities.items()}
    report = {
        "command": f"train_demo_model.py OUT --minutes {args.minutes:g} --family {args.family} --layers {args.layers} "
        f"--seed {args.seed}",
        "python": sys.version.split()[0],
        "shape": asdict(shape),
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_tokens_available": sizes,
        "mix": MIX,
        "tokens_seen": done["tokens"],
        "steps": done["step"],
        "seconds": round(done["seconds"]),
        "seed": args.seed,
        "peak_learning_rate": args.lr,
        "heldout_tokens": len(tokens),
        "heldout": table,
    }
    print(f"{'held-out':10s} {'perplexity':>10s} {'bits/byte':>10s}")
    for name, row in table.items():
        print(f"{name:10s} {row['perplexity']:10.2f} {row['bits_per_byte']:10.3f}", flush=True)
    report["agreement_with_transformers"] = check_with_transformers(model, corpus, args.out)
    (args.out / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    (args.out / "checkpoint.pt").unlink()


if __name__ == "__main__":
    main()
