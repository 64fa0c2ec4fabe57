"""Which weight each library gives to its micro-batches: equal ones, unequal ones, and those of a last, shorter window.

Every row runs the library itself for one epoch under `gradaccum.audit`, which solves each gradient that its optimizer
steps with for the micro-batches' own. They are noted in the collator, which all libraries call.
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
from gradaccum import audit
from gradaccum.data import IGNORED
from gradaccum.models import GPT

K = 4
EQUAL, UNEQUAL, REST = [4, 4, 4, 4], [1, 9, 2, 3], [4, 4]  # lines in each micro-batch of the three windows
WINDOWS = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
LENGTH = 16  # of every line where counts are to be equal


def lightning_trainer(task: Task, optimizer: torch.optim.Optimizer, k: int, *, manual: bool = False) -> Any:
    """Run Lightning's Trainer; `manual` is the loop of its manual optimization guide."""
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

    def epoch(micro_batches: Any) -> None:
        off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        trainer = Trainer(accelerator="cpu", max_epochs=1, accumulate_grad_batches=1 if manual else k, **off)
        trainer.fit(Module(), micro_batches)

    return epoch


def transformers_trainer(task: Task, optimizer: torch.optim.Optimizer, k: int, *, loss_function: Any = None) -> Any:
    """Run transformers' Trainer, unshuffled and without its default clipping."""
    from transformers import Trainer, TrainingArguments

    settings = {"max_grad_norm": 0.0, "train_sampling_strategy": "sequential", "remove_unused_columns": False}
    silent = {"report_to": [], "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    batches = {"num_train_epochs": 1, "per_device_train_batch_size": 1, "gradient_accumulation_steps": k}

    def epoch(micro_batches: Any) -> None:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            Trainer(
                model=task.model,
                args=TrainingArguments(output_dir=folder, **batches, **settings, **silent),
                train_dataset=micro_batches.dataset,
                data_collator=micro_batches.collate_fn,
                optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)),
                compute_loss_func=loss_function,
            ).train()

    return epoch


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


def gpt2(vocabulary: int) -> Task:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": vocabulary, "n_positions": 96, "n_embd": 32, "n_layer": 1, "n_head": 2}
    return labelled(GPT2LMHeadModel(GPT2Config(**sizes, use_cache=False, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)))


def sample_of(pair: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Give the same tokens as unshifted labels: one position more, whose label no model counts after its shift."""
    inputs, targets = pair
    tokens = torch.cat([inputs, targets[:, -1:].clamp(min=0)], dim=1)
    labels = torch.cat([inputs[:, :1], targets], dim=1)
    return {"input_ids": tokens, "labels": labels}


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
    Row("transformers Trainer", "a tiny GPT2LMHeadModel", transformers_trainer, BY_MODEL, TRAINER, gpt2),
    Row("transformers Trainer", "own model, mean loss", transformers_trainer, BY_FUNCTION, TRANSFORMERS, own_model),
    Row("transformers Trainer", "own model, `compute_loss_func`", WITH_LOSS, BY_FUNCTION, TRANSFORMERS, own_model),
    Row("gradaccum", "`windows` and `accumulate`", ours, "the rule itself: count the window first"),
]


def micro_batches_of() -> tuple[int, list[tuple[Tensor, Tensor]]]:
    characters, lines = names()
    stream, long = iter(lines), iter([line[:LENGTH] for line in lines if len(line) >= LENGTH])
    sizes = [(size, long) for size in EQUAL] + [(size, stream) for size in UNEQUAL] + [(size, long) for size in REST]
    return len(characters), [characters.batch([next(source) for _ in range(size)]) for size, source in sizes]


def measure(row: Row) -> dict[str, Any]:
    vocabulary, data = micro_batches_of()
    torch.manual_seed(0)
    task = row.task(vocabulary)
    if row.task is not pairs:
        data = [sample_of(pair) for pair in data]
    optimizer = Still(task.model.parameters())
    with audit(task.model, optimizer, partial(task.loss_sum, task.model), task.count, accumulation_steps=K) as seen:
        row.contender(task, optimizer, K)(loader(data, seen.note))
    return {
        "library": row.library,
        "version": VERSIONS[row.library] if row.library in VERSIONS else version(row.library.split()[0].lower()),
        "how": row.how,
        "updates": [
            {
                "micro_batches": update.micro_batches,
                "weights": [round(weight, 4) for weight in update.weights],
                "right": [round(share, 4) for share in update.right],
                "error": float(f"{update.error:.1e}"),
                "kind": update.kind,
            }
            for update in seen.updates
        ],
        "documentation": row.documentation,
        "url": row.url,
    }


def of_window(row: dict[str, Any], window: list[int]) -> dict[str, Any]:
    """Give what was found for the update that holds most of a window."""
    return max(row["updates"], key=lambda update: len(set(update["micro_batches"]) & set(window)))


def cell(update: dict[str, Any]) -> str:
    weights = " ".join(f"{weight:.4f}" for weight in update["weights"])
    error = f", {update['error']:.0%} off" if update["error"] >= 0.005 else ""
    return f"{weights} ({update['kind']}{error})"


def run(quick: bool) -> tuple[str, dict[str, Any] | None]:
    quiet()
    rows = [row for row in ROWS if installed(row.library)]
    measured = [measure(row) for row in tqdm(rows, desc="edges", leave=False)]
    lines = []
    for row in measured:
        found = [cell(of_window(row, window)) for window in WINDOWS]
        source = f"[{row['documentation']}]({row['url']})" if row["url"] else row["documentation"]
        lines.append([f"{row['library']} {row['version']}".strip(), row["how"], *found, source])
    counts = [int((targets != IGNORED).sum()) for _, targets in micro_batches_of()[1]]
    tokens = " + ".join(str(counts[index]) for index in WINDOWS[1])
    head = ["library", "how", "equal", f"unequal ({tokens} tokens)", f"2 left over of k = {K}", "documentation"]
    meaning = {
        "updates": "each optimizer step: the micro-batches in it, the weight that each got, and the right one",
        "windows": f"0 to 3 are equal, 4 to 7 have {tokens} target tokens, 8 and 9 are left over of k = {K}",
    }
    complete = len(rows) == len(ROWS)
    return "\n".join(table(head, lines)).rstrip(), {"columns": meaning, "rows": measured} if complete else None
