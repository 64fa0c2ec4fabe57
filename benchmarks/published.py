"""GPU memory that others published, beside what `predict_memory` says of the same layers without a GPU.

The figures are 25 rows of linkedin/Liger-Kernel's benchmark/data/all_benchmark_data.csv (snapshot ead96b61, 2026-08-21;
BSD-2-Clause, Copyright 2024 LinkedIn Corporation): `torch.cuda.max_memory_allocated()` on an A100 for the plain layers
of torch and Hugging Face beside which that library measures its own, the median of ten steps, in MiB. It does not say
with which torch; the dates suggest 2.4 and 2.5. The layers are written here from their description.

Covered: single layers, forward and backward. Not covered: optimizers, accumulation, autocast, dropout, attention,
convolution, several GPUs.
"""

import csv
import json
from pathlib import Path

import published_steps
import torch
from torch import nn
from torch.nn.functional import cross_entropy, silu

from gradaccum.memory import predict_memory

FIGURES = Path(__file__).with_name("published_gpu_memory.csv")


def classes(rows: int) -> torch.Tensor:
    return torch.zeros(rows, dtype=torch.long)


def of_cross_entropy(V: int, B: int, T: int, **_: object):
    def build():
        return torch.empty(B * T, V, requires_grad=True), classes(B * T)

    return build, lambda logits, targets: cross_entropy(logits, targets).backward()


class LinearAndLoss(nn.Module):
    def __init__(self, H: int, V: int) -> None:
        super().__init__()
        self.linear = nn.Linear(H, V, bias=False, dtype=torch.bfloat16)

    def forward(self, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return cross_entropy(self.linear(x), targets)


def of_linear_and_loss(BT: int, H: int, V: int, **_: object):
    def build():  # in each series a second layer is there, which this step does not use
        x = torch.empty(BT, H, dtype=torch.bfloat16, requires_grad=True)
        return LinearAndLoss(H, V), LinearAndLoss(H, V), x, classes(BT)

    return build, lambda layer, unused, x, targets: layer(x, targets).backward()


def of_layer_norm(N: int, M: int, eps: float, **_: object):
    def build():
        return nn.LayerNorm(N, eps), nn.LayerNorm(N, eps), torch.empty(M, N, requires_grad=True), torch.empty(M, N)

    return build, lambda layer, unused, x, dy: layer(x).backward(dy, retain_graph=True)


class RMSNorm(nn.Module):
    """Llama's: the mean of the squares in float32, the weight in float32 too."""

    def __init__(self, H: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(H)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype, x = x.dtype, x.to(torch.float32)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x.to(dtype)


def of_rms_norm(H: int, M: int, eps: float, **_: object):
    def build():
        x = torch.empty(M, H, dtype=torch.bfloat16, requires_grad=True)
        return RMSNorm(H, eps), RMSNorm(H, eps), x, torch.empty(M, H, dtype=torch.bfloat16)

    return build, lambda layer, unused, x, dy: layer(x).backward(dy, retain_graph=True)


class SwiGLU(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, inner, bias=False, dtype=torch.bfloat16)
        self.up = nn.Linear(width, inner, bias=False, dtype=torch.bfloat16)
        self.down = nn.Linear(inner, width, bias=False, dtype=torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(silu(self.gate(x)) * self.up(x))


def of_swiglu(T: int, B: int, hidden_size: int, intermediate_size: int, **_: object):
    def build():
        x = torch.empty(B, T, hidden_size, dtype=torch.bfloat16, requires_grad=True)
        return SwiGLU(hidden_size, intermediate_size), x

    def step(layer, x):
        y = layer(x)
        y.backward(torch.randn_like(y), retain_graph=True)

    return build, step


SERIES = {
    "cross_entropy": of_cross_entropy,
    "fused_linear_cross_entropy": of_linear_and_loss,
    "layer_norm": of_layer_norm,
    "rms_norm": of_rms_norm,
    "swiglu": of_swiglu,
}


def figures() -> list[dict[str, object]]:
    """Predict each row: series, what varies, published and predicted MiB, and whether they are the same number."""
    rows = []
    with FIGURES.open(encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            build, step = SERIES[row["series"]](**json.loads(row["fixed"]), **{row["varied"]: int(row["value"])})
            mebibytes = predict_memory(build, step).peak_bytes / 2**20
            published = float(row["mebibytes"])
            # The published figure went through float32, so the prediction does too.
            is_equal = torch.tensor(mebibytes, dtype=torch.float32).item() == published
            varied = f"{row['varied']} = {int(row['value']):,}"
            names = {"series": row["series"], "varied": varied}
            rows.append(names | {"published": published, "predicted": mebibytes, "is_equal": is_equal})
    return rows


def run(quick: bool = False) -> str:
    rows = figures()  # seconds: quick anyway
    off = [abs(row["predicted"] / row["published"] - 1) for row in rows]
    equal = sum(row["is_equal"] for row in rows)
    table = ["| series | size | published, MiB | predicted, MiB | off |", "|---|---|---:|---:|---:|"]
    for row, apart in zip(rows, off, strict=True):
        shown = "0" if row["is_equal"] else f"{100 * apart:.3f} %"
        numbers = f"{row['published']:,.7f} | {row['predicted']:,.7f}".replace("0000000", "0")
        table.append(f"| {row['series']} | {row['varied']} | {numbers} | {shown} |")
    head = f"{equal} of {len(rows)} are equal to the last digit; the largest difference is {100 * max(off):.3f} %."
    whole = "Whole steps, by what the allocator reserves, from rasbt/LLMs-from-scratch, ch05/10 (A100, torch 2.6):"
    return "\n".join([head, "", *table, "", whole, "", published_steps.run(quick)])


if __name__ == "__main__":
    print(run())
