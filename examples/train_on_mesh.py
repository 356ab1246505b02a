"""The compiled training loop on a mesh: torchrun --nproc-per-node 4 examples/train_on_mesh.py dp=2,tp=2 [STEPS].

What `q3n train` does on a mesh, in few lines on the public functions, without checkpoints. Ranks without a card compute
on the CPU.
"""

import os
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map

from q3n_functional import compiled, corpus, data, model, optim, params, tokenizer
from q3n_functional.config import PRESETS
from q3n_functional.parallel import mesh, placement, rules

layout = mesh.parse(sys.argv[1])
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 300
config = PRESETS["tiny"]()
optimizer = optim.OptimizerConfig(lr=4e-3, warmup_steps=30)
rows, length = 16, 128
mesh.check_batch(layout, config, rows, length)
where = rules.layouts(config, layout)  # what does not fit is refused here, before ranks meet or memory is taken

card = torch.cuda.is_available()
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if card else torch.device("cpu")
if card:
    torch.cuda.set_device(device)
dist.init_process_group("nccl" if card else "gloo")
rank = dist.get_rank()
parallel = placement.connect(layout, where, device)

# Every rank reads every batch and keeps its rows: batch i of a seed is the same batch on any mesh.
source, folder = Path(__file__).with_name("shakespeare.txt"), Path(f"runs/mesh-{rank}")
folder.mkdir(parents=True, exist_ok=True)
words = tokenizer.train_bpe(corpus.blocks(source), config.vocab_size)
tokens = corpus.read(corpus.tokenize(source, words, folder), config.vocab_size)
reader = data.reader(tokens, rows, length, name="training")
own = slice(rows // layout.rows * (at := layout.coordinates(rank)["rows"]), rows // layout.rows * (at + 1))

# The rank's shards of the weights that one device would start from.
tree = rules.init(config, 0, layout, rank, device=device)
masters = params.named_leaves(tree)
weights = tree_map(lambda p: p.detach().requires_grad_(), tree)
groups = optim.groups(config, optimizer)
state = optim.init(masters, groups)

loss = torch.compile(partial(model.loss, parallel=parallel, config=config), fullgraph=True, dynamic=False)
update = partial(optim.update_, parallel=parallel, groups=groups, optimizer=optimizer, moves=compiled.moves())

for step in range(steps):
    batch = data.batch(reader, step, seed=0)
    value, metrics = loss(weights, batch.tokens_BT[own].to(device))
    gradients = torch.autograd.grad(value, list(params.named_leaves(weights).values()))
    lr = torch.tensor(optim.learning_rate(step, steps, optimizer), device=device)
    norm = update(masters, dict(zip(masters, gradients, strict=True)), state, lr)
    if step % 10 == 0 and rank == 0:
        print(f"step {step}: {metrics.cross_entropy:.3f} nats per token, gradient norm {norm:.2f}", flush=True)
dist.destroy_process_group()
