"""What the exercises' texts say comes out: the lines of a try cell that say "expected", and the Examples.

The calls in an Example are run as they are. What else it says is measured by a function here, and looked for in the
text; the function gets the names after the set-up cell and the worked answer, and those with the cell as handed out.
"""

import ast
import io
import re
from contextlib import redirect_stdout
from unittest.mock import Mock

import torch
from torch import nn

COUNTS = ("no", "one", "two", "three", "four", "five", "six")
# What a line expects in words, and what must be printed above it.
IN_WORDS = {
    "a float each time, and as many bytes for 20 batches as for 5": (
        r"\d\.\d+\n5 batches: ([\d,]+) bytes\n\d\.\d+\n20 batches: \1 bytes"
    )
}


def expectations(notebook):
    """Run a solved notebook's try cells; yield the cell's id, what it expects, what came, and all printed above."""
    names = {}
    for cell in notebook.cells:
        if cell.id.partition("-")[0] in ("setup", "losses", "answer"):
            exec(cell.source, names)
        if cell.id.startswith("try-"):
            rows, lines, done = cell.source.splitlines(), [], 0
            for node in ast.parse(cell.source + "\npass").body:  # so that a comment at the end is before a statement
                with redirect_stdout(io.StringIO()) as printed:
                    exec(compile(ast.Module([node], []), cell.id, "exec"), names)
                source, done = "\n".join(rows[done : node.end_lineno]), node.end_lineno
                found = [(each, printed.getvalue().strip(), None) for each in re.findall("# expected: (.*)", source)]
                first = lines.pop() if lines else ""  # not ended yet, perhaps
                for line in (first + printed.getvalue()).split("\n"):
                    got, marker, wanted = line.partition("expected: ")
                    if "; got: " in wanted:
                        wanted, _, got = wanted.partition("; got: ")
                    if marker:
                        found.append((wanted, got.strip() or lines[-1], lines[:]))
                    lines.append(line)
                said = source.lower().count("expected")
                assert said == source.count("expected:") <= len(found), f"{cell.id}, not compared: {source}"
                yield from ((cell.id, *each) for each in found)


def holds(wanted, got, above):
    """Compare as text or, what is printed, number by number to the digits that are expected."""
    if wanted in IN_WORDS:
        return bool(re.fullmatch(IN_WORDS[wanted], "\n".join(above)))
    said, found = (re.findall(r"-?\d+\.?\d*", text) for text in (wanted, got))
    shown = [f"{float(number):.{len(one.partition('.')[2])}f}" for one, number in zip(said, found, strict=False)]
    return wanted == got or (above is not None and len(said) == len(found) > 0 and said == shown)


class OneWeight(nn.Module):
    """A model of one weight, 1 at first: each loss is its input, and has the same gradient wherever the weight is."""

    def __init__(self, names, slope=None):
        super().__init__()
        names["cross_entropy"] = loss_of
        self.weight, self.slope = nn.Parameter(torch.ones(())), slope
        self.updates = []  # the gradient of each

    def forward(self, inputs):
        slope = inputs if self.slope is None else self.slope
        return (inputs + slope * (self.weight - 1)).unsqueeze(-1)

    def sgd(self, lr=0.1):
        optimizer = torch.optim.SGD(self.parameters(), lr=lr)
        optimizer.register_step_pre_hook(lambda *_: self.updates.append(self.weight.grad.item()))
        return optimizer

    @property
    def moved(self):
        return self.weight.item() - 1


def loss_of(logits, targets, reduction="mean"):
    """Take the logits themselves for the losses."""
    counted = logits[..., 0][targets != -100]
    return counted.sum() if reduction == "sum" else counted.mean()


def batches(*losses):
    return [(torch.tensor([[loss]]), torch.tensor([[0]])) for loss in losses]


def flat(*losses):
    """As `batches`, for a model without a dimension of positions."""
    return [(inputs[0], targets[0]) for inputs, targets in batches(*losses)]


def example_1_1(solved, given):
    model = solved["models"].embedding_linear(vocabulary=1000, width=2)
    for parameter in model.parameters():
        parameter.data.zero_()
    step = model, torch.optim.SGD(model.parameters(), lr=0.1), *torch.tensor([[[3]], [[5]]])
    first, second = solved["training_step"](*step), solved["training_step"](*step)
    assert second < first
    yield f"has the loss log 1000 = {first:.3f}."


def example_1_2(solved, given):
    yield f"the function returns `{solved['epoch_loss'](OneWeight(solved), batches(2.0, 3.0))}`"


def example_2_2(solved, given):
    for names, said in ((solved, "by {:.1f} in all."), (given, "The code as it is moves it by {:.1f}.")):
        model = OneWeight(names)
        names["train"](model, model.sgd(), flat(2.0, 4.0, 1.0, 3.0), accumulation_steps=2)
        yield said.format(model.moved)


def example_2_3(solved, given):
    model = OneWeight(solved)
    step, rows = (model, model.sgd()), (torch.tensor([2.0, 4.0, 1.0, 3.0, 5.0]), torch.zeros(5))
    solved["delayed_step"](*step, *rows, 2)
    yield f"the sum is {model.updates[0]:.0f}."
    yield f"the weight moves by {model.moved:.1f}."
    for most_rows in (1, 3, 4, 5, 6, 2):
        before = model.moved
        solved["delayed_step"](*step, *rows, most_rows)
        again = f"by {model.moved - before:.1f}"
        yield f"It moves {again} with any other `most_rows` too, and if the next call gets the same rows, {again} again"


def example_3_1(solved, given):
    for gradients, said in (
        ((2.0, 4.0, 9.0), "and 9, `.grad` ends as {:.0f}."),
        ((2.0, 4.0, 9.0, 1.0), "of 1, `.grad` ends as {:.0f}:"),
    ):
        model = OneWeight(solved)
        solved["accumulate_window"](model, iter(flat(*gradients)))
        yield said.format(model.weight.grad)


def example_4_2(solved, given):
    model = OneWeight(solved)
    solved["train_epoch"](model, model.sgd(), flat(1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 2.0), 3)
    assert model.updates[:2] == [2, 5]  # the means of 1, 2, 3 and of 4, 5, 6
    yield f"k = 3 make {COUNTS[len(model.updates)]} updates"
    yield f"then {model.updates[2]:.0f} is what goes through `backward()`"


def example_4_3(solved, given):
    model = OneWeight(solved)
    solved["train"](model, model.sgd(), flat(1.0, 2.0, 3.0, 4.0, 5.0), 2, 2)
    assert model.updates == 2 * [1.5, 3.5, 5]
    yield f"two epochs make {COUNTS[len(model.updates)]} updates"


def example_4_4(solved, given):
    model = OneWeight(solved)
    (logged,) = solved["train_windows"](model, model.sgd(), Mock(), [flat(2.0, 4.0)], 1.0)
    yield f"is logged as {logged}."
    for names, said in ((solved, "move the schedule on by {},"), (given, "moves it on by {}.")):
        model, schedule = OneWeight(names), Mock()
        names["train_windows"](model, model.sgd(), schedule, 3 * [flat(2.0, 4.0)], 1.0)
        yield said.format(schedule.step.call_count)


def example_5_2(solved, given):
    model = OneWeight(solved, slope=3)
    window = [(torch.tensor([[4.0, 6.0]]), torch.zeros(1, 2)), (torch.ones(1, 8), torch.zeros(1, 8))]
    window.append((torch.ones(1, 3), torch.full((1, 3), -100)))
    yield f"Then the step returns {solved['weighted_step'](model, model.sgd(lr=1.0), window):.1f}."
    yield f"would lower the weight by {-model.moved:.0f}."


def example_5_3(solved, given):
    for names, said in ((given, "measures {} with the code as given."), (solved, "Repaired, it takes {}.")):
        with redirect_stdout(io.StringIO()) as printed:
            exec(names["TRY"], names)
        yield said.format(printed.getvalue().splitlines()[-1])


def example_5_5(solved, given):
    model, batch = nn.Linear(2, 3), (torch.randn(5, 2), torch.tensor([0, 2, 1, 1, 0]))
    total, count = 'cross_entropy(model(x), y, reduction="sum")', "len(y)"

    def value(code):
        return lambda batch: eval(code, {**solved, "model": model, "x": batch[0], "y": batch[1]})

    pieces = [tuple(each[rows] for each in batch) for rows in (slice(1), slice(1, 5))]
    mean = "cross_entropy(model(x), y)"
    assert solved["check_split"](model, batch, value(mean), pieces, value(total), value(count))
    yield f"For the loss `{mean}`, with no padding, the pair is `{total}` and `{count}`."


def example_6_2(solved, given):
    yield f"the plan is `{solved['plan'](lambda size: 1000 + 10 * size, 50, 1205)}`"


def example_6_4(solved, given):
    losses, model = iter([2.0, 4.0]), nn.Embedding(2, 2, _weight=torch.eye(2))
    solved["cross_entropy"] = lambda logits, _: next(losses) + 0 * logits.sum()
    window = [(torch.tensor([[0] * right + [1] * (10 - right)]), torch.zeros(1, 10)) for right in (3, 5)]
    loss, share = solved["train_step"](model, torch.optim.SGD(model.parameters()), window)
    yield f"it returns {loss} and {share}."
