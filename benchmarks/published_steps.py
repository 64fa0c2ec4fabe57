"""GPU memory that others published for whole training steps, beside what `predict_memory` says.

Three rows of the table in rasbt/LLMs-from-scratch, ch05/10_llm-training-speed: `torch.cuda.memory_reserved()` at the
end of a training of a GPT of 124 million weights on an A100, torch 2.6, AdamW, 8 rows of 1,024 tokens. The models are
written here from their description. Reserved memory depends on the order of allocations, so equal digits are no aim.

And the two rounded peaks in PyTorch's tutorial "How to save memory by fusing the optimizer step into the backward
pass": ViT-L/16, one image, Adam, about 6 GB and, with a step for each parameter in backward, about 4 GB.
"""

import math

import torch
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from gradaccum.memory import predict_memory

VOCABULARY, WIDTH, LAYERS, HEADS, LENGTH = 50257, 768, 12, 12, 1024
GIB = 2**30


class PlainNorm(nn.Module):
    """A layer norm in single operations, each of which keeps its result."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return self.scale * ((x - mean) / torch.sqrt(variance + 1e-5)) + self.shift


class PlainGELU(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        root = torch.sqrt(torch.tensor(2.0 / math.pi))
        return 0.5 * x * (1 + torch.tanh(root * (x + 0.044715 * torch.pow(x, 3))))


class PlainAttention(nn.Module):
    """Scores, mask, softmax and dropout one after the other; the mask is a float buffer, or made at each call."""

    def __init__(self, has_buffer: bool) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.out, self.dropout = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.1)
        if has_buffer:
            self.register_buffer("mask", torch.ones(LENGTH, LENGTH).triu(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        parts = (
            layer(x).view(batch, length, HEADS, -1).transpose(1, 2) for layer in (self.key, self.value, self.query)
        )
        key, value, query = parts
        scores = query @ key.transpose(2, 3)
        mask = self.mask if hasattr(self, "mask") else torch.ones(length, length).triu(1)
        mask = mask.bool()[:length, :length]
        scores.masked_fill_(mask, -torch.inf)
        weights = self.dropout(torch.softmax(scores / key.shape[-1] ** 0.5, dim=-1))
        return self.out((weights @ value).transpose(1, 2).contiguous().view(batch, length, WIDTH))


class FusedAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        query, key, value = self.qkv(x).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        y = scaled_dot_product_attention(query, key, value, dropout_p=0.1, is_causal=True)
        return self.out(y.transpose(1, 2).contiguous().view(batch, length, WIDTH))


class Block(nn.Module):
    def __init__(self, attention: nn.Module, norm: type, gelu: nn.Module) -> None:
        super().__init__()
        self.attention, self.dropout = attention, nn.Dropout(0.1)
        self.before, self.between = norm(WIDTH), norm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), gelu, nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.dropout(self.attention(self.before(x))) + x
        return self.dropout(self.mlp(self.between(x))) + x


class GPT(nn.Module):
    def __init__(self, attention, norm: type, gelu) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(*(Block(attention(), norm, gelu()) for _ in range(LAYERS)))
        self.dropout, self.norm, self.head = nn.Dropout(0.1), norm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.dropout(self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1])))
        return self.head(self.norm(self.blocks(x)))


def loss_of(model: GPT, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


def step(model: GPT, optimizer: torch.optim.Optimizer, inputs: torch.Tensor, targets: torch.Tensor) -> None:
    optimizer.zero_grad()
    loss_of(model, inputs, targets).backward()
    optimizer.step()


PLAIN = {"norm": PlainNorm, "gelu": PlainGELU}
NATIVE = {"norm": nn.LayerNorm, "gelu": lambda: nn.GELU(approximate="tanh")}
ROWS = {  # the parts, the type of the weights, whether AdamW is fused, and the published GiB
    "float32, all in single operations": (
        {"attention": lambda: PlainAttention(True)} | PLAIN,
        torch.float32,
        None,
        26.2617,
    ),
    "bfloat16, fused AdamW, mask on the fly": (
        {"attention": lambda: PlainAttention(False)} | PLAIN,
        torch.bfloat16,
        True,
        13.7871,
    ),
    "the same with fused attention, native norm and GELU": (
        {"attention": FusedAttention} | NATIVE,
        torch.bfloat16,
        True,
        5.9004,
    ),
}


def figures() -> list[dict[str, object]]:
    """Predict each row: its name, published GiB, and what is predicted as allocated and as reserved, in GiB."""
    rows = []
    for name, (parts, dtype, fused, published) in ROWS.items():

        def build(parts=parts, dtype=dtype, fused=fused):
            model = GPT(**parts).to(dtype)
            tokens = (torch.zeros(8, LENGTH, dtype=torch.long) for _ in range(2))
            return model, torch.optim.AdamW(model.parameters(), lr=4e-4, weight_decay=0.1, fused=fused), *tokens

        report = predict_memory(build, step)
        found = {"allocated": report.peak_bytes / GIB, "reserved": report.reserved_bytes / GIB}
        rows.append({"name": name, "published": published} | found)
    return rows


class ViT(nn.Module):
    """ViT-L/16 with torch's own encoder layers, in the place of torchvision's."""

    def __init__(self, width: int = 1024, layers: int = 24) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, width, 16, 16), nn.Linear(width, 1000)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, 14 * 14 + 1, width))
        options = {"dropout": 0.0, "activation": nn.GELU(), "batch_first": True, "norm_first": True}
        self.blocks = nn.Sequential(
            *(nn.TransformerEncoderLayer(width, 16, 4 * width, **options) for _ in range(layers))
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.patches(images).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


def vit_peaks() -> dict[str, float]:
    """Predict the peaks of the tutorial's two ways to step, in GB."""

    def build(in_hooks: bool):
        model, images = ViT(), torch.zeros(1, 3, 224, 224)
        if not in_hooks:
            return model, torch.optim.Adam(model.parameters()), images
        optimizers = {each: torch.optim.Adam([each], foreach=False) for each in model.parameters()}

        def hook(parameter: torch.Tensor) -> None:
            optimizers[parameter].step()
            optimizers[parameter].zero_grad()

        for each in model.parameters():
            each.register_post_accumulate_grad_hook(hook)
        return model, list(optimizers.values()), images

    def vit_step(model: ViT, optimizer: torch.optim.Optimizer | list, images: torch.Tensor) -> None:
        model(images).sum().backward()
        if not isinstance(optimizer, list):
            optimizer.step()
            optimizer.zero_grad()

    ways = {"after backward": False, "in backward": True}
    return {
        way: predict_memory(lambda in_hooks=hooks: build(in_hooks), vit_step).peak_bytes / 1e9
        for way, hooks in ways.items()
    }


def run(quick: bool = False) -> str:
    table = [
        "| GPT, 124 million | published, reserved GiB | predicted | off | predicted as allocated |",
        "|---|---|---|---|---|",
    ]
    for row in figures():
        off = f"{100 * (row['reserved'] / row['published'] - 1):+.2f} %"
        numbers = f"{row['published']:.4f} | {row['reserved']:.4f} | {off} | {row['allocated']:.4f}"
        table.append(f"| {row['name']} | {numbers} |")
    return "\n".join(table)


if __name__ == "__main__":
    print(run(), vit_peaks(), sep="\n\n")
