"""Reserved GPU memory that others published for whole training steps, beside `predict_memory(...).reserved_bytes`.

Three rows of the table in rasbt/LLMs-from-scratch, ch05/10_llm-training-speed: `torch.cuda.memory_reserved()` at the
end of a training of a GPT of 124 million weights on an A100, torch 2.6, AdamW, 8 rows of 1,024 tokens. The models are
written here from their description. Reserved memory depends on the order of allocations, so equal digits are no aim.
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
    print(run())
