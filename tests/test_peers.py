"""Other libraries under `audit`: README's recipes, and the record that lesson 5 shows. `make test-peers` runs these."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from threaded import said_by_ranks
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from gradaccum import audit

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))
pytestmark = pytest.mark.peers
torch.set_num_threads(1)
SIZES = [8, 1, 3, 5, 2, 9, 4, 4, 6]  # windows of 4, 4 and 1


def recipe(library):
    """Return the code block of README that names a library."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    (found,) = (block for block in blocks if re.search(rf"# {library}\b", block))
    return found


def rows_and_loader():
    generator = torch.Generator().manual_seed(0)
    rows = [(torch.randn(n, 6, generator=generator), torch.randint(3, (n,), generator=generator)) for n in SIZES]
    return DataLoader(rows, batch_size=1, collate_fn=lambda given: given[0])


def names_for(model, optimizer):
    def loss_sum(batch):
        return cross_entropy(model(batch[0]), batch[1], reduction="sum")

    return {
        "model": model,
        "optimizer": optimizer,
        "loader": rows_and_loader(),
        "loss_sum": loss_sum,
        "count": lambda batch: len(batch[1]),
        "mean_loss": lambda batch: cross_entropy(model(batch[0]), batch[1]),
        "audit": audit,
    }


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


FAULTS = ["each mean over k"] * 2 + ["a partial window over k"]


def test_accelerate():
    accelerate = pytest.importorskip("accelerate")
    model = small()
    names = names_for(model, torch.optim.SGD(model.parameters(), lr=0.5))
    accelerator = accelerate.Accelerator(gradient_accumulation_steps=4, cpu=True)
    scope = names | {"accelerator": accelerator}

    def training_step(batch):
        accelerator.backward(names["mean_loss"](batch))
        scope["wrapped"].step()
        scope["wrapped"].zero_grad()

    scope["training_step"] = training_step
    exec(recipe("accelerate"), scope)
    assert [update.kind for update in scope["seen"].updates] == FAULTS


def test_lightning(tmp_path, monkeypatch):
    lightning = pytest.importorskip("lightning.pytorch")
    monkeypatch.chdir(tmp_path)

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = small()

        def forward(self, x):
            return self.model(x)

        def training_step(self, batch, index):
            return cross_entropy(self(batch[0]), batch[1])

    module = Module()
    names = names_for(module, torch.optim.SGD(module.parameters(), lr=0.5))
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    scope = names | {
        "module": module,
        "Trainer": lambda **options: lightning.Trainer(accelerator="cpu", **options, **quiet),
    }
    exec(recipe("Lightning"), scope)
    assert [update.kind for update in scope["seen"].updates] == FAULTS


@pytest.mark.parametrize("kind", ["Llama", "GPT2"])
def test_transformers(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "Llama":
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=40, **sizes))
    else:
        sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=40, **sizes))
    rows = [{"input_ids": torch.randint(40, (length,))} for length in (20, 3, 9, 4, 15, 7, 6, 12, 5)]
    silent = {"report_to": [], "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        num_train_epochs=1,
        max_grad_norm=0.0,
        remove_unused_columns=False,
        **silent,
    )
    scope = {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "args": args,
        "dataset": rows,
        "collator": lambda given: {"input_ids": given[0]["input_ids"][None], "labels": given[0]["input_ids"][None]},
        "Trainer": transformers.Trainer,
        "audit": audit,
    }
    exec(recipe("transformers"), scope)
    kinds = [update.kind for update in scope["seen"].updates]
    # Before its shift a row has one label more than are summed; Trainer drops it where the class is ...ForCausalLM.
    assert kinds == (["right"] * 3 if kind == "Llama" else ["another divisor"] * 3)


@pytest.mark.parametrize("library", ["accelerate", "lightning"])
def test_models_prepared_for_two_ranks(library, tmp_path):
    pytest.importorskip(library)
    said = said_by_ranks(Path(__file__).with_name("peers_job.py"), 2, tmp_path / "store", f"two_{library}")
    assert said == {(f"two_{library}", rank): "ok" for rank in (0, 1)}


def test_the_record_is_what_these_libraries_do():
    for library in ("accelerate", "lightning", "transformers"):
        pytest.importorskip(library)
    import edges

    record = json.loads((ROOT / "gradaccum" / "edges.json").read_text("utf-8"))["rows"]
    edges.quiet()
    found = [edges.measure(row) for row in edges.ROWS]
    assert [row["how"] for row in found] == [row["how"] for row in record]
    for row, before in zip(found, record, strict=True):
        for update, known in zip(row["updates"], before["updates"], strict=True):
            assert (update["kind"], update["micro_batches"]) == (known["kind"], known["micro_batches"])
            assert update["weights"] == pytest.approx(known["weights"], abs=2e-4)
