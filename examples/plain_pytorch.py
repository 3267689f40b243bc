"""A plain PyTorch trainer: a small transformer learns to read digits, and then mirrored ones.

    python examples/plain_pytorch.py [folder for the task vector]

The second task trains a tenth of the weights and leaves a small file, which edits the first model.
"""

import copy
import sys
from pathlib import Path
from tempfile import gettempdir

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import talos

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32) / 16  # [1797, 8, 8]: a row is a token
mirrored, labels = images.flip(2), torch.tensor(digits.target)
layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, activation="gelu", batch_first=True)
encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
model = nn.Sequential(nn.Linear(8, 64), encoder, nn.Flatten(), nn.Linear(512, 10))


def train(optimizer: torch.optim.Optimizer, inputs: torch.Tensor, epochs: int) -> None:
    for _ in range(epochs):
        for batch in torch.randperm(1200).split(100):
            cross_entropy(model(inputs[batch]), labels[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()


@torch.no_grad()
def accuracies(model: nn.Module) -> str:
    right = [model(x[1200:]).argmax(1) == labels[1200:] for x in (images, mirrored)]
    return "digits {:.1%}, mirrored digits {:.1%}".format(*(r.float().mean().item() for r in right))


train(torch.optim.AdamW(model.parameters(), lr=3e-3), images, epochs=10)
pretrained = copy.deepcopy(model)
print("pretrained:", accuracies(pretrained))

model[-1].requires_grad_(False)  # the head stays as it is
mask = talos.calibrate(model, mirrored[:1200].split(60), density=0.1)
optimizer = talos.SparseAdam(model, mask, lr=3e-2)
train(optimizer, mirrored, epochs=15)
print("fine-tuned:", accuracies(model))

path = Path(*sys.argv[1:] or [gettempdir()]) / "mirrored.safetensors"
optimizer.task_vector().save(path, torch.bfloat16)
dense = sum(weight.nbytes for weight in model.parameters())
print(f"{path.name}: {path.stat().st_size:,} bytes, the model {dense:,}")
with talos.TaskVector.load(path).applied(pretrained, scale=0.5):
    print("half of it:", accuracies(pretrained))
print("taken off:", accuracies(pretrained))
