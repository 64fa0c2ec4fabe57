"""What each library does at the edges: a last partial window, and unequal token counts in a full one.

Every row runs the library itself for two epochs with an optimizer that copies `.grad` at each step and changes nothing.
As the weights stay, each copy is a sum of the micro-batches' own gradients, and least squares says which ones it holds.
"""

import contextlib
import io
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
from contenders import (
    Contender,
    Still,
    Task,
    accelerate_context,
    accelerate_tokens,
    divided_by_k,
    fabric,
    installed,
    loader,
    names,
    ours,
    quiet,
    table,
    token_task,
)
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

import gradaccum
from gradaccum import full_batch_gradient, relative_error
from gradaccum.data import IGNORED
from gradaccum.models import GPT

K = 4
EQUAL = [4, 4, 4, 4, 4, 4]  # lines in each micro-batch, all of one length: a window of 4, then one of 2
UNEQUAL = [1, 9, 2, 3]  # lines of any length: one full window
LENGTH = 16


def lightning_trainer(task: Task, optimizer: torch.optim.Optimizer, k: int, *, manual: bool = False) -> Any:
    """Run Lightning's Trainer, two epochs in one call; `manual` is the loop of its manual optimization guide."""
    from lightning.pytorch import LightningModule, Trainer

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = task.model
            self.automatic_optimization = not manual

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer

        def training_step(self, micro_batch: Any, batch_idx: int) -> Tensor | None:
            loss = task.loss_mean(self.model, micro_batch)
            if not manual:
                return loss
            self.manual_backward(loss)
            if (batch_idx + 1) % k == 0:
                self.optimizers().step()
                self.optimizers().zero_grad()
            return None

    def epochs(micro_batches: Any) -> None:
        off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        trainer = Trainer(accelerator="cpu", max_epochs=2, accumulate_grad_batches=1 if manual else k, **off)
        trainer.fit(Module(), micro_batches)

    return epochs


def transformers_trainer(task: Task, optimizer: torch.optim.Optimizer, k: int, *, loss_function: Any = None) -> Any:
    """Run transformers' Trainer, two epochs in one call, unshuffled and without its default clipping."""
    from transformers import Trainer, TrainingArguments

    settings = {"max_grad_norm": 0.0, "train_sampling_strategy": "sequential", "remove_unused_columns": False}
    silent = {"report_to": [], "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    batches = {"num_train_epochs": 2, "per_device_train_batch_size": 1, "gradient_accumulation_steps": k}

    def epochs(micro_batches: Any) -> None:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            Trainer(
                model=task.model,
                args=TrainingArguments(output_dir=folder, **batches, **settings, **silent),
                train_dataset=micro_batches.dataset,
                data_collator=lambda samples: samples[0],
                optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)),
                compute_loss_func=loss_function,
            ).train()

    return epochs


def shifted_loss(logits: Tensor, labels: Tensor, reduction: str) -> Tensor:
    """Compare each position's logits with the next label, as transformers' causal models do."""
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction=reduction)


class MeanLoss(nn.Module):
    """A model of one's own for transformers' Trainer: a mean loss, and no further keyword arguments."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor | None]:
        logits = self.model(input_ids)
        return {"loss": None if labels is None else shifted_loss(logits, labels, "mean"), "logits": logits}


def labelled(model: nn.Module) -> Task:
    def loss_sum(model: nn.Module, sample: dict[str, Tensor]) -> Tensor:
        return shifted_loss(model(input_ids=sample["input_ids"])["logits"], sample["labels"], "sum")

    return Task(model, loss_sum, loss_sum, lambda sample: (sample["labels"][:, 1:] != IGNORED).sum())


def pairs(vocabulary: int) -> Task:
    return token_task(GPT(vocabulary, width=32, layers=1, heads=2))


def own_model(vocabulary: int) -> Task:
    return labelled(MeanLoss(GPT(vocabulary, width=32, layers=1, heads=2)))


def llama(vocabulary: int) -> Task:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 96}
    return labelled(LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2, use_cache=False)))


def sample_of(pair: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Give the same tokens as unshifted labels: one position more, its first label ignored."""
    inputs, targets = pair
    labels = torch.cat([torch.full_like(targets[:, :1], IGNORED), targets], dim=1)
    return {"input_ids": torch.cat([inputs, targets[:, -1:].clamp(min=0)], dim=1), "labels": labels}


def summed_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return shifted_loss(outputs["logits"], labels, "sum") / num_items_in_batch


class Row(NamedTuple):
    """One way to use one library: what runs it, and what its documentation says about these edges, and where."""

    library: str
    how: str
    contender: Contender
    documentation: str = ""
    url: str = ""
    task: Callable[[int], Task] = pairs


STEPS_AT_END = partial(divided_by_k, step_at_end=True)
FABRIC_AS_WRITTEN = partial(fabric, as_written=True)
MANUAL = partial(lightning_trainer, manual=True)
WITH_LOSS = partial(transformers_trainer, loss_function=summed_loss)
ACCELERATE = "https://huggingface.co/docs/accelerate/usage_guides/gradient_accumulation"
FABRIC = "https://lightning.ai/docs/fabric/stable/advanced/gradient_accumulation.html"
TRICKS = "https://lightning.ai/docs/pytorch/stable/advanced/training_tricks.html"
MANUALLY = "https://lightning.ai/docs/pytorch/stable/model/manual_optimization.html"
TRANSFORMERS = "https://huggingface.co/docs/transformers/grad_accumulation"
TRAINER = "https://huggingface.co/docs/transformers/main_classes/trainer"
FOR_TOKENS = "the guide's last section mends both: a loop for samples of variable size"
AS_WRITTEN = "the guide's loop; it names no divisor, no last window and no token counts"
NO_OPTION = "no option found; pytorch-lightning#19987 (last window) and #21386 (tokens) are about it"
BY_MODEL = "`loss_is_scaled_for_ga`: a model that accepts loss kwargs is given `num_items_in_batch`"
BY_FUNCTION = "'Loss scaling': a `compute_loss_func` divides a summed loss by `num_items_in_batch`"
VERSIONS = {"no library": "", "gradaccum": gradaccum.__version__}
ROWS = [
    Row("no library", "the /k loop", divided_by_k),
    Row("no library", "the /k loop, stepping at the end of the epoch too", STEPS_AT_END),
    Row("accelerate", "`with accelerator.accumulate(model)`", accelerate_context, FOR_TOKENS, ACCELERATE),
    Row("accelerate", "the guide's loop for samples of variable size", accelerate_tokens, FOR_TOKENS, ACCELERATE),
    Row("Lightning Fabric", "`no_backward_sync`, the guide's loop", FABRIC_AS_WRITTEN, AS_WRITTEN, FABRIC),
    Row(
        "Lightning Fabric", "the same, `(iteration + 1) % k` and loss / k", fabric, "our mend, not the guide's", FABRIC
    ),
    Row("Lightning Trainer", "`accumulate_grad_batches`", lightning_trainer, NO_OPTION, TRICKS),
    Row("Lightning Trainer", "manual optimization, the guide's loop", MANUAL, AS_WRITTEN, MANUALLY),
    Row("transformers Trainer", "a tiny LlamaForCausalLM", transformers_trainer, BY_MODEL, TRAINER, llama),
    Row("transformers Trainer", "own model, mean loss", transformers_trainer, BY_FUNCTION, TRANSFORMERS, own_model),
    Row("transformers Trainer", "own model, `compute_loss_func`", WITH_LOSS, BY_FUNCTION, TRANSFORMERS, own_model),
    Row("gradaccum", "`windows` and `accumulate`", ours, "the rule itself: count the window first"),
]


def micro_batches_of(sizes: list[int], length: int | None) -> tuple[int, list[tuple[Tensor, Tensor]]]:
    characters, lines = names()
    stream = iter([line[:length] for line in lines if length is None or len(line) >= length])
    return len(characters), [characters.batch([next(stream) for _ in range(size)]) for size in sizes]


def flat(gradient: list[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().double().flatten() for tensor in gradient])


def steps_of(row: Row, sizes: list[int], length: int | None) -> tuple[Any, list[tuple[int, Tensor, set[int]]]]:
    """Run two epochs: for each step its epoch, its gradient, and the micro-batches which that gradient holds.

    Also gives `right`: the gradient of the mean loss over some of the micro-batches.
    """
    vocabulary, data = micro_batches_of(sizes, length)
    torch.manual_seed(0)
    task = row.task(vocabulary)
    if row.task is not pairs:
        data = [sample_of(pair) for pair in data]
    forwards: list[None] = []

    def mean(some: list[Any]) -> Tensor:
        return sum(task.loss_sum(task.model, each) for each in some) / sum(task.count(each) for each in some)

    def right(some: Any) -> Tensor:
        return flat(full_batch_gradient(task.model, [data[index] for index in sorted(some)], mean))

    alone = torch.stack([right([index]) for index in range(len(data))], dim=1)
    copies: list[tuple[int, Tensor]] = []
    optimizer = Still(task.model.parameters(), lambda gradient: copies.append((len(forwards), flat(gradient))))
    run = row.contender(task, optimizer, K)
    hook = task.model.register_forward_pre_hook(lambda *_: forwards.append(None))
    while len(forwards) < 2 * len(data):  # a trainer runs both epochs at once
        run(loader(data))
    hook.remove()
    steps = []
    for after, gradient in copies:
        share = torch.linalg.lstsq(alone, gradient[:, None]).solution[:, 0].tolist()
        held = {index for index, part in enumerate(share) if abs(part) > 1e-3}
        steps.append(((after - 1) // len(data), gradient, held))
    return right, steps


def measure(row: Row) -> dict[str, Any]:
    right, steps = steps_of(row, EQUAL, LENGTH)
    rest = {K, K + 1}
    own = next((gradient for _, gradient, held in steps if held == rest), None)
    ratio = None if own is None else round((own @ right(rest) / right(rest).square().sum()).item(), 3)
    leaks = any(epoch == 1 and held & rest and 0 in held for epoch, _, held in steps)
    right_unequal, unequal = steps_of(row, UNEQUAL, None)
    full = next(gradient for _, gradient, held in unequal if len(held) == K)
    return {
        "library": row.library,
        "version": VERSIONS[row.library] if row.library in VERSIONS else version(row.library.split()[0].lower()),
        "how": row.how,
        "partial_window_ratio": ratio,
        "partial_window": "stepped" if own is not None else "leaks into the next epoch" if leaks else "dropped",
        "micro_batches_per_step": [len(held) for _, _, held in steps],
        "unequal_counts_error": float(f"{relative_error(full, right_unequal(range(K))):.1e}"),
        "documentation": row.documentation,
        "url": row.url,
    }


def run(quick: bool) -> tuple[str, dict[str, Any] | None]:
    quiet()
    rows = [row for row in ROWS if installed(row.library)]
    measured = [measure(row) for row in tqdm(rows, desc="edges", leave=False)]
    counts = [int((targets != IGNORED).sum()) for _, targets in micro_batches_of(UNEQUAL, None)[1]]
    lines = []
    for row in measured:
        ratio, error, link = row["partial_window_ratio"], row["unequal_counts_error"], row["url"]
        lines.append(
            [
                f"{row['library']} {row['version']}".strip(),
                row["how"],
                "none" if ratio is None else f"{ratio:.3f}",
                f"{row['partial_window']} ({', '.join(map(str, row['micro_batches_per_step']))})",
                f"{error:.1%}" if error > 1e-4 else f"{error:.0e}",
                f"[{row['documentation']}]({link})" if link else row["documentation"],
            ]
        )
    meaning = {
        "partial_window_ratio": "gradient at the step of 2 left-over micro-batches (k = 4) over the right one, or null",
        "micro_batches_per_step": "how many micro-batches each step held, over two epochs of 6",
        "unequal_counts_error": f"relative gradient error of a full window of {counts} target tokens",
    }
    unequal = f"unequal counts ({' + '.join(map(str, counts))} tokens)"
    text = table(["library", "how", "left over: ratio", "left over: where", unequal, "documentation"], lines)
    complete = len(rows) == len(ROWS)
    return "\n".join(text).rstrip(), {"columns": meaning, "rows": measured} if complete else None
