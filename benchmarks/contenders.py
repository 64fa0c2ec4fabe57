"""The loops that are compared: ours, the same by hand, the /k loop, and each library's as its own guide writes it.

A contender is a function (task, optimizer, k) that gives a function which runs one epoch over micro-batches.
"""

import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from gradaccum import accumulate, windows
from gradaccum.data import Characters, character_names, count_targets, shuffled


@dataclass
class Task:
    """A model, and how the loss of a micro-batch is computed; `model` is an argument because libraries wrap it."""

    model: nn.Module
    loss_sum: Callable[[nn.Module, Any], Tensor]
    loss_mean: Callable[[nn.Module, Any], Tensor]
    count: Callable[[Any], Any]


Epoch = Callable[[Iterable[Any]], None]
Contender = Callable[[Task, torch.optim.Optimizer, int], Epoch]


def token_loss(reduction: str) -> Callable[[nn.Module, Any], Tensor]:
    def loss(model: nn.Module, micro_batch: Any) -> Tensor:
        logits = model(micro_batch[0])
        if logits.dtype == torch.bfloat16:  # as under autocast, and as transformers does: the loss in float32
            logits = logits.float()
        return functional.cross_entropy(logits.flatten(0, 1), micro_batch[1].flatten(), reduction=reduction)

    return loss


def token_task(model: nn.Module) -> Task:
    return Task(model, token_loss("sum"), token_loss("mean"), count_targets)


def names() -> tuple[Characters, list[str]]:
    """Give the vocabulary of the Unicode character names, and the names shuffled."""
    lines = character_names()
    return Characters(lines), shuffled(lines, seed=0)


class Still(torch.optim.Optimizer):
    """An optimizer that shows its gradients to `record` at each step, and changes nothing."""

    def __init__(self, parameters: Iterable[nn.Parameter], record: Callable[[list[Tensor]], None] = lambda _: None):
        super().__init__(parameters, {"lr": 0.0})
        self.record = record

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        with torch.enable_grad():
            loss = closure() if closure else None
        self.record([torch.zeros_like(p) if p.grad is None else p.grad for p in self.param_groups[0]["params"]])
        return loss


def loader(micro_batches: list[Any], note: Callable[[Any], Any] = lambda micro_batch: micro_batch) -> DataLoader[Any]:
    """Give what a library's loop expects: a DataLoader that yields these micro-batches in this order, noting each."""
    return DataLoader(micro_batches, batch_size=1, collate_fn=lambda samples: note(samples[0]))


def ours(task: Task, optimizer: torch.optim.Optimizer, k: int) -> Epoch:
    loss_sum = partial(task.loss_sum, task.model)

    def epoch(micro_batches: Iterable[Any]) -> None:
        for window in windows(micro_batches, k):
            accumulate(task.model, window, loss_sum, task.count)
            optimizer.step()
            optimizer.zero_grad()

    return epoch


def by_hand(task: Task, optimizer: torch.optim.Optimizer, k: int) -> Epoch:
    def epoch(micro_batches: Iterable[Any]) -> None:
        for window in windows(micro_batches, k):
            total = sum(task.count(micro_batch) for micro_batch in window)
            logged = torch.zeros(())
            for micro_batch in window:
                loss = task.loss_sum(task.model, micro_batch) / total
                loss.backward()
                logged += loss.detach()
            optimizer.step()
            optimizer.zero_grad()

    return epoch


def divided_by_k(task: Task, optimizer: torch.optim.Optimizer, k: int, *, step_at_end: bool = False) -> Epoch:
    def epoch(micro_batches: Iterable[Any]) -> None:
        last = len(micro_batches) - 1 if step_at_end else None
        for step, micro_batch in enumerate(micro_batches):
            (task.loss_mean(task.model, micro_batch) / k).backward()
            if (step + 1) % k == 0 or step == last:
                optimizer.step()
                optimizer.zero_grad()

    return epoch


def accelerate_context(task: Task, optimizer: torch.optim.Optimizer, k: int, *, tokens: bool = False) -> Epoch:
    """Run the guide's finished code: everything inside `with accelerator.accumulate(model)`.

    With `tokens`, its loop for samples of variable size: read a window, count it, undo the library's own 1/k.
    """
    from accelerate import Accelerator

    accelerator = Accelerator(gradient_accumulation_steps=k, cpu=True)
    model, wrapped = accelerator.prepare(task.model, optimizer)

    def for_equal(micro_batches: Any) -> None:
        for micro_batch in micro_batches:
            with accelerator.accumulate(model):
                accelerator.backward(task.loss_mean(model, micro_batch))
                wrapped.step()
                wrapped.zero_grad()

    def for_tokens(micro_batches: Any) -> None:
        stream, left = iter(micro_batches), len(micro_batches)
        while left:
            window = [next(stream) for _ in range(min(k, left))]
            left -= len(window)
            items = accelerator.gather(sum(task.count(micro_batch) for micro_batch in window)).sum().item()
            for micro_batch in window:  # the guide's no_sync has no effect in one process
                accelerator.backward(task.loss_sum(model, micro_batch) * k * accelerator.num_processes / items)
            wrapped.step()
            wrapped.zero_grad()

    epoch = for_tokens if tokens else for_equal
    return lambda given: epoch(accelerator.prepare(given) if isinstance(given, DataLoader) else given)


accelerate_tokens = partial(accelerate_context, tokens=True)


def fabric(task: Task, optimizer: torch.optim.Optimizer, k: int, *, as_written: bool = False) -> Epoch:
    """Run the guide's `no_backward_sync` loop.

    As written it steps where `iteration % k == 0` and divides the loss by nothing; otherwise, both are mended here.
    """
    from lightning.fabric import Fabric

    engine = Fabric(accelerator="cpu", devices=1)
    model, wrapped = engine.setup(task.model, optimizer)

    def epoch(micro_batches: Iterable[Any]) -> None:
        if isinstance(micro_batches, DataLoader):
            micro_batches = engine.setup_dataloaders(micro_batches)
        for iteration, micro_batch in enumerate(micro_batches):
            is_accumulating = (iteration if as_written else iteration + 1) % k != 0
            with engine.no_backward_sync(model, enabled=is_accumulating):
                loss = task.loss_mean(model, micro_batch)
                engine.backward(loss if as_written else loss / k)
            if not is_accumulating:
                wrapped.step()
                wrapped.zero_grad()

    return epoch


CONTENDERS: dict[str, Contender] = {
    "gradaccum.accumulate": ours,
    "the same loop by hand": by_hand,
    "the /k loop": divided_by_k,
    "accelerate, `accumulate()`": accelerate_context,
    "accelerate, the guide's token loop": accelerate_tokens,
    "Lightning Fabric, `no_backward_sync`, loss / k": fabric,
}
OURS, HAND, OVER_K, ACCELERATE, ACCELERATE_TOKENS, FABRIC = CONTENDERS


def installed(contender: str) -> bool:
    """Say whether the library that a contender's name begins with is here; with a plain line where it is not."""
    library = contender.replace(",", "").split()[0].lower()
    here = library not in ("accelerate", "lightning", "transformers") or importlib.util.find_spec(library) is not None
    if not here:
        print(f"skipped: {contender} ({library} is not installed; the peers extra brings it)")
    return here


def table(head: list[str], rows: list[list[Any]]) -> list[str]:
    """Give the lines of a Markdown table, and an empty one after it."""
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(str(cell) for cell in line)} |" for line in lines] + [""]


def quiet() -> None:
    """Keep the libraries' banners and advice out of the output."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
