"""A trainer in the style of nanoGPT: a GPT on characters, in one file.

    python examples/nanogpt.py [--out FOLDER] [--init CHECKPOINT] [--steps 100] ...

A model that knows the source code of Python's standard library (`--init` loads another) is
fine-tuned on the prose of Python's built-in help, with autocast, gradient accumulation, clipping, a
cosine schedule and a GradScaler. Both texts come with Python. The trainer was written for AdamW: of
its lines SparseAdam changed three, each under a comment `# was:`, and it needs `import talos`.
"""

import argparse
import math
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from tempfile import gettempdir

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn import functional

import talos

Batch = tuple[Tensor, Tensor]  # characters and their successors, int64 [B, T] each
VOCABULARY = 128  # ASCII


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, width]
        heads = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # [B, heads, T, width / heads] each
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        change: Tensor = self.down(functional.gelu(self.up(self.mlp_norm(x))))
        return x + change


class GPT(nn.Module):
    def __init__(self, width: int, layers: int, heads: int, block: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(block, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        for table in (self.tokens, self.positions):
            nn.init.normal_(table.weight, std=0.1)

    def forward(self, ids: Tensor) -> Tensor:  # [B, T] -> [B, T, VOCABULARY]
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        return functional.linear(self.norm(self.blocks(x)), self.tokens.weight)


def encoded(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text, "ascii", "ignore"), dtype=torch.uint8)


def source_code() -> Tensor:
    folder = Path(sysconfig.get_path("stdlib"))
    return encoded("".join(path.read_text("utf-8") for path in sorted(folder.glob("*.py"))))


def loss_of(model: nn.Module, batch: Batch, dtype: torch.dtype) -> Tensor:
    ids, successors = batch
    with torch.autocast(ids.device.type, dtype, enabled=dtype != torch.float32):
        logits = model(ids)
    return functional.cross_entropy(logits.float().flatten(0, 1), successors.flatten())


def pretrain(model: nn.Module, steps: int, draw: Callable[[Tensor], Batch]) -> None:
    text = source_code()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        loss_of(model, draw(text), torch.float32).backward()
        optimizer.step()
        optimizer.zero_grad()


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fine-tunes a small GPT on Python's help.")
    out = Path(gettempdir())
    parser.add_argument("--out", type=Path, default=out, help="folder of what is saved")
    parser.add_argument("--init", type=Path, help="a state_dict to begin with")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", help="of autocast; float32 turns it off")
    parser.add_argument("--lr", type=float, default=3e-2)
    sizes = {"width": 64, "layers": 2, "heads": 4, "block": 64, "batch": 16}
    lengths = {"pretrain": 200, "steps": 100, "warmup": 10, "accumulate": 2}
    for name, default in (sizes | lengths).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> nn.Module:
    """Train as the options say, and return the model."""
    args = options(arguments)
    dtype: torch.dtype = getattr(torch, args.dtype)
    torch.manual_seed(0)

    def draw(text: Tensor) -> Batch:
        starts = torch.randint(len(text) - args.block, (args.batch, 1))
        ids = text[starts + torch.arange(args.block + 1)].long().to(args.device)
        return ids[:, :-1], ids[:, 1:]

    def lr_factor(step: int) -> float:
        rise: float = (step + 1) / (args.warmup + 1)
        done: float = (step - args.warmup) / max(args.steps - args.warmup, 1)
        return rise if rise < 1 else 0.5 + 0.5 * math.cos(math.pi * done)

    model = GPT(args.width, args.layers, args.heads, args.block).to(args.device)
    if args.init:
        model.load_state_dict(torch.load(args.init, map_location=args.device, weights_only=True))
    else:
        pretrain(model, args.pretrain, draw)

    prose = encoded("".join(topics.values()))
    training, validation = prose.tensor_split([int(0.9 * len(prose))])
    samples = {"training": [draw(training) for _ in range(16)]}
    samples["validation"] = [draw(validation) for _ in range(16)]

    @torch.no_grad()
    def report(step: int) -> None:
        for name, batches in samples.items():
            losses = torch.stack([loss_of(model, batch, dtype) for batch in batches])
            print(f"step {step}: {name} loss {losses.mean().item():.3f}")

    # was: optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    optimizer = talos.SparseAdam(model, talos.calibrate(model, samples["training"]), lr=args.lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor)
    scaler = GradScaler(args.device, enabled=dtype == torch.float16)
    report(0)
    for _ in range(args.steps):
        for _ in range(args.accumulate):
            loss = loss_of(model, draw(training), dtype) / args.accumulate
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        # was: nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.clip_grad_norm_(1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scheduler.step()
    report(args.steps)
    # was: torch.save(model.state_dict(), args.out / "model.pt")
    optimizer.task_vector().save(args.out / "prose.safetensors")
    return model


if __name__ == "__main__":
    main()
