"""The compiled training loop on the package's public functions: python examples/train_compiled.py [STEPS]."""

import sys
from functools import partial
from pathlib import Path

import torch
from torch.utils._pytree import tree_map

from q3n_functional import compiled, corpus, data, model, optim, params, tokenizer
from q3n_functional.config import PRESETS

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 300
device = "cuda" if torch.cuda.is_available() else "cpu"
config = PRESETS["tiny"]()
optimizer = optim.OptimizerConfig(lr=4e-3, warmup_steps=30)

# Text to batches: batch i of a seed is always the same batch.
source, folder = Path(__file__).with_name("shakespeare.txt"), Path("runs/compiled")
folder.mkdir(parents=True, exist_ok=True)
words = tokenizer.train_bpe(corpus.blocks(source), config.vocab_size)
tokens = corpus.read(corpus.tokenize(source, words, folder), config.vocab_size)
reader = data.reader(tokens, rows=16, length=128, name="training")

# A model is a tree of tensors; here twice over one storage, because the loss wants gradients and the update none.
tree = params.init(config, seed=0, device=device)
masters = params.named_leaves(tree)
weights = tree_map(lambda p: p.detach().requires_grad_(), tree)
groups = optim.groups(config, optimizer)
state = optim.init(masters, groups)

# Two graphs: the gradient is taken outside the first, so that its partitioner can recompute instead of storing. The
# backend is Inductor, which meanwhile has the kernels of the ops compiled as well.
loss = torch.compile(partial(model.loss, config=config), fullgraph=True, backend=compiled.inductor)
update = partial(optim.update_, groups=groups, optimizer=optimizer, moves=compiled.moves())

for step in range(steps):
    batch = data.batch(reader, step, seed=0)
    value, metrics = loss(weights, batch.tokens_BT.to(device))
    gradients = torch.autograd.grad(value, list(params.named_leaves(weights).values()))
    lr = torch.tensor(optim.learning_rate(step, steps, optimizer), device=device)
    norm = update(masters, dict(zip(masters, gradients, strict=True)), state, lr)
    if step % 10 == 0:
        print(f"step {step}: {metrics.cross_entropy:.3f} nats per token, gradient norm {norm:.2f}")
