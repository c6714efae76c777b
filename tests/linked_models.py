"""Small modules in which channels can be changed, and some in which they cannot."""

import torch
import torch.nn.functional as F
from torch import nn


def randomised(module, seed=0):
    """Random weights of moderate size, gains near one, in float64."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(0.0, 0.4, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
    return module.double().eval().requires_grad_(requires_grad=False)


class Root(nn.Module):
    """Divide by the root mean square."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class PostNorm(nn.Module):
    """One block of an encoder as in BERT: biases, and norms after the residual sum."""

    def __init__(self, width=12, heads=3, classes=5):
        super().__init__()
        self.heads = heads
        self.table = nn.Embedding(23, width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out_proj = nn.Linear(width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, 17), nn.Linear(17, width)
        self.head = nn.Linear(width, classes)

    def forward(self, tokens):
        x = self.table(tokens)
        q, k, v = (
            one(x).view(*x.shape[:2], self.heads, -1).transpose(1, 2)
            for one in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = self.norm1(x + self.out_proj(mixed))
        x = self.norm2(x + self.fc2(F.gelu(self.fc1(x))))
        return self.head(x.mean(1))


class PreNorm(nn.Module):
    """A norm with a bias, and two maps with ReLU between them."""

    def __init__(self, width=9, inner=14, classes=4):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, classes)

    def forward(self, x):
        return self.fc2(F.relu(self.fc1(self.norm(x))))


class Convolutions(nn.Module):
    """ReLU between the first, ReLU6 between the last; one reads each channel by itself."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.own = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.point = nn.Conv2d(6, 8, 1)
        self.clipped = nn.Conv2d(8, 7, 3)
        self.last = nn.Conv2d(7, 5, 1)
        self.head = nn.Linear(5 * 4, 4)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.first(x)), 2)
        x = F.relu(self.point(F.relu(self.own(x))))
        x = self.last(F.relu6(self.clipped(x)))
        return self.head(F.adaptive_avg_pool2d(F.relu(x), 2).flatten(1))


class Fused(nn.Module):
    """Queries, keys and values made by one map."""

    def __init__(self, width=8, heads=2):
        super().__init__()
        self.heads, self.width = heads, width
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = (
            one.reshape(*x.shape[:2], self.heads, -1).transpose(1, 2)
            for one in self.qkv(x).chunk(3, dim=-1)
        )
        shares = (q @ k.transpose(-1, -2)).softmax(-1)
        return self.out((shares @ v).transpose(1, 2).reshape(x.shape))


class Grouped(nn.Module):
    """A language model as Llama: heads that share values, a gate, a head of its own."""

    def __init__(self, width=12, heads=4, shared=2, inner=18, vocabulary=23):
        super().__init__()
        self.size = width // heads
        self.table = nn.Embedding(vocabulary, width)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(width, width // shared) for _ in range(2))
        self.o_proj = nn.Linear(width, width, bias=False)
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)
        self.norm1, self.norm2, self.norm3 = (Root(width) for _ in range(3))
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens):
        x = self.table(tokens)
        normed = self.norm1(x)
        q, k, v = (
            one(normed).view(*x.shape[:2], -1, self.size).transpose(1, 2)
            for one in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o_proj(mixed.transpose(1, 2).reshape(x.shape))
        normed = self.norm2(x)
        x = x + self.down(F.silu(self.gate(normed)) * self.up(normed))
        return self.head(self.norm3(x))


class StateSpace(nn.Module):
    """A language model of selective state spaces, as Mamba: blocks of scan, one residual stream."""

    def __init__(self, width=16, inner=24, state=4, rank=3, vocabulary=29, blocks=2):
        super().__init__()
        self.table = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(
            SelectiveBlock(width, inner, state, rank) for _ in range(blocks)
        )
        self.norm = Root(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens):
        x = self.table(tokens)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x))


class SelectiveBlock(nn.Module):
    def __init__(self, width, inner, state, rank):
        super().__init__()
        self.inner, self.state, self.rank = inner, state, rank
        self.norm = Root(width)
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.convolution = nn.Conv1d(inner, inner, 3, groups=inner, padding=2)
        self.x_proj = nn.Linear(inner, rank + 2 * state, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.decay = nn.Parameter(torch.zeros(inner, state))
        self.skip = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x):
        x, gate = self.in_proj(self.norm(x)).chunk(2, dim=-1)
        length = x.shape[1]
        x = F.silu(self.convolution(x.transpose(1, 2))[..., :length].transpose(1, 2))
        step, reads, writes = self.x_proj(x).split([self.rank, self.state, self.state], dim=-1)
        step = F.softplus(self.dt_proj(step))
        kept = torch.exp(-step[..., None] * self.decay.exp())
        h, answers = torch.zeros_like(kept[:, 0]), []
        for t in range(length):
            h = kept[:, t] * h + (step[:, t] * x[:, t])[..., None] * reads[:, t, None]
            answers.append((h * writes[:, t, None]).sum(-1))
        y = torch.stack(answers, 1) + self.skip * x
        return self.out_proj(y * F.silu(gate))
