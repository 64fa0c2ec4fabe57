"""The engine of the exercises: what a check catches, how long it waits, what it says, and that it leaves no trace."""

import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
import warnings

import numpy
import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from traitlets.config import Config

from gradaccum import accumulate, exercises, windows
from gradaccum.exercises import Score, cards, check, compare, scorecard
from gradaccum.exercises.compare import Difference, agree
from gradaccum.exercises.judge import LEFT, SAME, UNKNOWN, grade, judge
from gradaccum.exercises.question import Property, Question, known_mistakes, mistake
from gradaccum.exercises.run import observe, plain
from gradaccum.exercises.weighing import Gradient, Weights


def numbers(draw):
    return [{"x": 2.0}, {"x": draw.uniform(3, 9)}]


@mistake("This is the square; multiply by 2.")
def squared(x):
    return x * x


@mistake("Nothing is returned; return the double.")
def lost(x):
    pass


@mistake("The double is wanted, this is the triple.")
def tripled(x):
    return 3 * x


def probe(answer, case):
    return answer(case["x"])


def question(properties, *mistakes, **options):
    return Question("Double it", tuple(properties), id="9.1", mistakes=dict(enumerate(mistakes)), **options)


def at(name, *values, points=1, **options):
    """Make a property of the double of some values."""
    cases = [{"x": value} for value in values]
    return Property(name, points, lambda draw: cases, probe, lambda case: 2 * case["x"], "x = {x}", **options)


THE_DOUBLE = Property("the double comes out", 2, numbers, probe, lambda case: 2 * case["x"], "x = {x}")
DOUBLE = question([THE_DOUBLE, at("of 0 too", 0.0, after="the double comes out")], squared, lost, tripled)


def double(x):
    return x + x


# ------------------------------------------------------------------------------------------------ points, verdicts


def test_full_points_and_the_text_for_nbgrader():
    score = Score(grade(DOUBLE, double))
    assert score == 3
    assert repr(score) == str(score) == "3.0"
    assert score.report.splitlines()[0] == "Exercise 9.1, Double it: 3 of 3 points"
    assert [result.passed for result in score.outcome.results] == [True, True]
    assert pickle.loads(pickle.dumps(float(score))) == 3.0


def test_a_mistake_is_named_and_dependents_wait():
    outcome = grade(DOUBLE, squared.answer)
    assert (outcome.points, outcome.recognized) == (0, squared)
    first, second = outcome.results
    assert first.passed is False
    assert first.tried.startswith("x = ")
    assert first.tried != "x = 2", "at 2 the square is the double"
    assert second.passed is None
    assert second.problem == "This counts once the following holds: the double comes out."


def test_an_unknown_kind_shows_the_difference():
    outcome = grade(DOUBLE, lambda x: 6 * x)
    assert (outcome.points, outcome.mistake) == (0, "")
    assert outcome.results[0].difference == Difference("4", "12", "exactly 3 times as large")


# ------------------------------------------------------------------------------------------------ which mistake


def split(negative, positive):
    """Make an answer of two: one for numbers below zero, one for the others."""
    return lambda x: negative(x) if x < 0 else positive(x)


HALVES = [at("below", -3.0, -5.0), at("above", 3.0, 5.0)]


def test_what_is_the_same_everywhere_goes_first():
    in_part = mistake("In part.")(split(tripled, lambda x: 2 * x))
    asked = question(HALVES, in_part, tripled)
    assert grade(asked, lambda x: 3 * x).recognized is tripled
    assert grade(asked, split(tripled, lambda x: 2 * x)).recognized is in_part


def test_a_mistake_the_answer_has_right_is_out():
    everywhere = question(HALVES, tripled)
    assert grade(everywhere, split(tripled, lambda x: 2 * x)).mistake == ""


def test_a_mistake_that_fails_otherwise_is_out():
    asked = question(HALVES, tripled)
    assert grade(asked, split(tripled, lambda x: 7 * x)).mistake == ""


def test_two_mistakes_are_both_named():
    one = mistake("One.")(split(tripled, lambda x: 2 * x))
    two = mistake("Two.")(split(lambda x: 2 * x, squared))
    asked = question(HALVES, two, one)
    assert grade(asked, split(tripled, squared)).mistake == "One. And one more: Two."
    outcome = grade(asked, split(tripled, lambda x: 9 * x))
    assert outcome.mistake == f"One. {UNKNOWN}"
    assert outcome.recognized is one


def test_bytes_name_a_mistake_by_failing_alone():
    most = Property(
        "small",
        1,
        numbers,
        probe,
        lambda case: 1e9,
        "",
        lambda got, most: Difference("", "") if got > most else None,
        by_value=False,
    )
    large = mistake("Too large.")(lambda x: 1e12 * x)
    asked = question([most], large)
    assert grade(asked, lambda x: 7e11 * x).recognized is large
    assert grade(question([THE_DOUBLE, most], large), lambda x: 7e11 * x).recognized is None


def test_another_error_of_a_kind_is_not_the_same():
    def raises(text):
        def answer(x):
            raise RuntimeError(text)

        return answer

    known = mistake("The graph is gone.")(raises("the graph is gone"))
    asked = question(DOUBLE.properties, known)
    assert grade(asked, raises("the graph is gone")).recognized is known
    assert grade(asked, raises("the shapes differ")).recognized is None


def test_a_factor_of_one_case_alone_is_not_told():
    three = question([at("double", 1.0, 2.0)])
    assert grade(three, lambda x: 6 * x).results[0].difference.relation == "exactly 3 times as large"
    assert grade(three, lambda x: 5 * x + 1).results[0].difference == Difference("2", "6")


def test_mistakes_are_found_in_the_order_written():
    names = {"b": tripled, "x": 1, "more": {"a": squared, "c": 2}, "__builtins__": {"d": lost}}
    assert known_mistakes(names) == {"b": tripled, "a": squared}
    assert list(known_mistakes(names)) == ["b", "a"]


# ------------------------------------------------------------------------------------------------ which weights


MEANS = {1: [1.0, 0.0, 2.0, 1.0, 0.5], 2: [0.0, 1.0, 1.0, 2.0, 0.5], 3: [3.0, 1.0, 0.0, 0.0, 1.0]}
OTHER = [0.0, 0.0, 0.0, 0.0, 1.0]


def summed(weights, rest=0.0):
    columns = [*MEANS.values(), OTHER]
    return [sum(w * each for w, each in zip((*weights, rest), row, strict=True)) for row in zip(*columns, strict=True)]


def weighed(*answers, counts=(4, 4, 4), means=MEANS, mistakes=(), steps=3):
    """Judge one answer for each property, whose probe gives the gradient that is the answer."""
    right = {number: count / sum(counts) for number, count in enumerate(counts, start=1)}

    def parts(case, got):
        yield Gradient(got, means, right, dict(enumerate(counts, start=1)), steps)

    expected = summed(right.values())
    properties = [
        Property(
            f"{index}", 1, lambda draw, at=index: [{"at": at}], at_number, lambda case: expected, "it", parts=parts
        )
        for index in range(len(answers))
    ]
    return grade(question(properties, *mistakes), lambda at: answers[at])


def at_number(answer, case):
    return answer(case["at"])


def row(outcome):
    return str(outcome.results[0].weights or "")


def test_a_row_says_which_weights_it_got():
    assert row(weighed(summed([1, 1, 1]))) == "The micro-batches got the weights 1 each and should have 1/3 each."
    said = "The micro-batches got the weights 0, 1/2, 1/3 and should have 1/2, 1/4, 1/4."
    assert row(weighed(summed([0, 0.5, 1 / 3]), counts=(8, 4, 4))) == said
    said = "The micro-batches got the weights 0.334, 0.333, 0.333 and should have 0.333 each."
    assert row(weighed(summed([0.3337, 1 / 3, 1 / 3]))) == said
    said = "The micro-batches got the weights 0.3334 each and should have 0.3333 each."
    assert row(weighed(summed([0.33343] * 3))) == said
    assert row(weighed(summed([-1, 2.5, 0]))).startswith("The micro-batches got the weights -1, 2.5, 0 and")


TWINS = MEANS | {3: MEANS[2]}


@pytest.mark.parametrize(
    ("got", "means"),
    [
        (summed([1, 1, 1], rest=0.3), MEANS),
        (summed([1, 1, 1], rest=1e-4), MEANS),
        ([float("nan"), *summed([1, 1, 1])[1:]], MEANS),
        ([float("inf")] * 5, MEANS),
        ([10**400] * 5, MEANS),
        (summed([1, 1, 1])[:4], MEANS),
        ([0.0] * 5, MEANS),
        ("not a number", MEANS),
        (None, MEANS),
        ([[1.0]], MEANS),
        ([summed([1, 1, 1])], MEANS),
        ([2.0 * a + b for a, b in zip(TWINS[1], TWINS[2], strict=True)], TWINS),
        (summed([1, 1, 1]), MEANS | {4: OTHER, 5: [1.0] * 5}),
        (summed([1, 1, 1]), MEANS | {3: [0.0] * 5}),
        (summed([1, 1, 1]), {}),
    ],
)
def test_no_row_where_the_weights_are_not_known(got, means):
    outcome = weighed(got, means=means)
    assert outcome.points == 0
    assert outcome.results[0].weights is None


def test_how_much_is_no_weighted_sum_is_said():
    said = weighed(summed([0.3, 0.3, 0.3], rest=0.3)).said
    assert re.match(r"[\d.]+ % of this gradient is not a weighted sum of the micro-batches' gradients: is it ", said)
    off, held = OTHER, summed([0.3, 0.3, 0.3], rest=0.3)
    matrix = torch.tensor([*MEANS.values()], dtype=torch.float64).T
    off = torch.tensor(off, dtype=torch.float64)
    rest = 0.3 * (off - matrix @ torch.linalg.pinv(matrix) @ off).norm() / torch.tensor(held).norm()
    assert float(said.split(" ")[0]) == pytest.approx(100 * rest.item(), rel=0.06)


@pytest.mark.parametrize(
    ("weights", "counts", "said"),
    [
        ([1, 1, 1], (4, 4, 4), "Each micro-batch got the weight 1: the gradient is 3 times too large. Divide by the"),
        ([8, 4, 4], (8, 4, 4), "Each item got the weight 1: losses are summed, and the gradient is 16 times too large"),
        ([1 / 3] * 3, (8, 4, 4), "Each mean was divided by 3: micro-batches of 8, 4 and 4 items got the same weight."),
        ([0, 0, 1 / 3], (4, 4, 4), "Only the last micro-batch contributes: are"),
        ([1 / 3, 1 / 6, 1 / 9], (4, 4, 4), "Each micro-batch lost a different share: are"),
        ([1 / 4] * 3, (4, 4, 4), "That is as if each mean were divided by 4, where 3 micro-batches are in the window."),
        ([8 / 17, 4 / 17, 4 / 17], (8, 4, 4), "That is as if each sum were divided by 17, where 16 items count."),
        ([0.3, 0.15, 0.15], (8, 4, 4), ""),
        ([0, 1 / 3, 1 / 3], (4, 4, 4), ""),
        ([0.4, 0.2, 0.3], (4, 4, 4), ""),
    ],
)
def test_an_unknown_cause_gets_audits_sentence(weights, counts, said):
    outcome = weighed(summed(weights), counts=counts)
    assert outcome.said.startswith(said)
    assert bool(outcome.said) == bool(said)
    assert outcome.mistake == ""


def test_a_partial_window_over_k_is_named():
    assert weighed(summed([1 / 5] * 3), steps=5).said.startswith("Divided by k = 5, and the window has 3: ")


def test_a_sentence_is_true_of_all_that_failed():
    undivided, other = summed([1, 1, 1]), summed([1, 2, 3])
    assert weighed(undivided, undivided).said
    outcome = weighed(undivided, other)
    assert outcome.said == ""
    assert [result.weights.got for result in outcome.results] == [pytest.approx([1, 1, 1]), pytest.approx([1, 2, 3])]


def test_a_named_mistake_has_no_second_sentence():
    known = mistake("Not divided.")(lambda at: summed([1, 1, 1]))
    outcome = weighed(summed([1, 1, 1]), mistakes=[known])
    assert (outcome.mistake, outcome.said) == ("Not divided.", "")
    assert row(outcome)


def test_the_row_is_of_the_case_that_was_tried():
    right = dict.fromkeys(MEANS, 1 / 3)

    def parts(case, got):
        yield Gradient(summed(right.values()), MEANS, right, {}, name="In update 1")
        yield Gradient(got, MEANS, right, {}, name="In update 2")

    cases = [{"w": 1 / 3}, {"w": 2.0}, {"w": 3.0}]
    each = Property("", 1, lambda draw: cases, probe_of_w, lambda case: summed(right.values()), "w = {w}", parts=parts)
    (result,) = grade(question([each]), lambda w: summed([w] * 3)).results
    assert result.tried == "w = 2"
    assert str(result.weights) == "In update 2, the micro-batches got the weights 2 each and should have 1/3 each."


def test_pieces_are_called_pieces():
    found = Weights("Here", [1, 2], [1.0, 0.5], [1.0, 1.0], "", "", unit="piece")
    assert str(found) == "Here, the pieces got the weights 1, 1/2 and should have 1 each."


@pytest.mark.parametrize(
    ("identifier", "index", "said"),
    [
        ("3.1", 1, "a generator of 7 micro-batches of 3 samples each"),
        ("2.2", 1, "2 windows, each of 3 micro-batches of size 4, then the same windows again, without the last"),
        (
            "2.2",
            2,
            "accumulation_steps=1 and 5 micro-batches of size 3, then the same micro-batches again, without the last",
        ),
    ],
)
def test_what_was_tried_is_in_words(identifier, index, said):
    question = exercises.find(identifier)
    assert question.properties[index].tried.format(**question.cases(0)[index][0]) == said


def probe_of_w(answer, case):
    return answer(case["w"])


def test_a_card_leads_with_the_relation():
    score = Score(weighed(summed([1, 1, 1])))
    lines = [line.strip() for line in score.report.splitlines()[2:]]
    assert lines[:3] == ["Exactly 3 times as large as it should be.", row(score.outcome), "Tried: it."]
    assert lines[3].startswith("Expected: [")
    assert lines[4].startswith("Got: [")
    lead, _, folded = score._repr_html_().partition("<details>")
    assert "<svg role='img' aria-label='The weights as bars, the right ones as dashed outlines.'" in lead
    assert lead.count("<rect ") == 6
    assert "Expected" not in lead
    assert "Got: [" in folded
    shown = Score(grade(DOUBLE, lambda x: 3.3 * x))._repr_html_()
    assert "Got: 6.6" in shown
    assert "<details>" not in shown


# ------------------------------------------------------------------------------------------------ how values differ


@pytest.mark.parametrize(
    ("got", "expected", "relation"),
    [
        ([2.0, 4.0], [1.0, 2.0], "exactly 2 times as large"),
        ([2.5, 5.0], [1.0, 2.0], "exactly 2.5 times as large"),
        ([5.0], [2.0], "150 % off"),
        ([0.5], [2.0], "exactly 1/4 as large"),
        ([2.0, 4.0], [3.0, 6.0], "exactly 2/3 as large"),
        ([-1.0, -2.0], [2.0, 4.0], "exactly -0.5 times as large"),
        ([1.0, 2.0], [13.0, 26.0], "exactly 0.076923 times as large"),
        ({"weights moved by": [0.0]}, {"weights moved by": [1.0]}, "the weights did not move"),
        ({"gradient": [0.0]}, {"gradient": [1.0]}, "`.grad` is empty or all zeros"),
        ({"a": [0.0]}, {"a": [1.0]}, "all zeros"),
        ([0.0, 0.0], [1.0, 2.0], "all zeros"),
        ([1.0, 1.0], [0.0, 0.0], "zeros were expected"),
        ([1.0, 2.002], [1.0, 2.0], "0.0894 % off, relative to the length of what was expected"),
        ([float("nan"), 2.0], [1.0, 2.0], "not finite"),
        ([1.0], [1.0, 2.0], ""),
        (None, [1.0, 2.0], ""),
        ([1, 2, 4], [1, 2, 3], ""),
        (3.0000001, 3, "close, but not exact"),
        ({"a": 1}, {"b": 1}, ""),
        ({"a": 1.0, "b": True}, {"a": 1.0, "b": False}, ""),
        (True, 1, ""),
        ([[1], [2]], [[1], [3]], ""),
        ("sum", "mean", ""),
        (float("inf"), 1.0, "not finite"),
    ],
)
def test_what_does_not_agree_and_how(got, expected, relation):
    difference = agree(got, expected)
    assert difference is not None
    assert difference.relation == relation


@pytest.mark.parametrize(
    ("got", "expected"),
    [
        ([1.0, 2.0 + 1e-7], [1.0, 2.0]),
        ([1, 2], [1.0, 2.0]),
        (3.0, 3),
        ([], []),
        ({"a": [0.0]}, {"a": [0.0]}),
        (None, None),
    ],
)
def test_what_agrees(got, expected):
    assert agree(got, expected) is None


def test_the_cases_follow_from_the_seed_alone():
    assert DOUBLE.cases(1) == DOUBLE.cases(1) != DOUBLE.cases(2)


def test_a_class_sets_its_own_seed(monkeypatch):
    seen = []

    def spy(reduction, sizes):
        seen.append(sizes)
        return len(sizes)

    check("3.2", spy)
    first, seen[:] = list(seen), []
    monkeypatch.setenv("GRADACCUM_SEED", "autumn")
    check("3.2", spy)
    assert first != seen


# ------------------------------------------------------------------------------------------------ what goes wrong


def stub(x):
    raise NotImplementedError


def torch_misses_something(x):
    torch.zeros(1, device="meta").item()  # raises, and NotImplementedError in some versions
    return 2 * x


def test_not_written_yet_is_not_an_error():
    outcome = grade(DOUBLE, stub)
    assert (outcome.points, outcome.note) == (0, "Not written yet.")
    assert [result.passed for result in outcome.results] == [None, None]
    assert grade(DOUBLE, torch_misses_something).note == ""


def broken(x):
    numbers = [x]
    return numbers[1]  # too far


def test_an_exception_is_one_line_with_its_source():
    outcome = grade(DOUBLE, broken)
    line = broken.__code__.co_firstlineno + 2
    sentence = f"Line {line}, `return numbers[1]  # too far`: IndexError: list index out of range"
    assert [result.problem for result in outcome.results] == [sentence, "The same error."]
    assert outcome.points == 0


@pytest.mark.parametrize("identifier", ["3.3", "5.4"])
@pytest.mark.parametrize(("found", "shown"), [(None, "None"), ("wrong", "'wrong'"), (0.15219, "0.152"), (1, "1")])
def test_a_verdict_is_true_or_false(identifier, found, shown):
    outcome = grade(exercises.find(identifier), lambda step: found)
    assert (outcome.points, outcome.mistake) == (0, "")
    assert outcome.results[0].problem == f"Your test returned {shown}: return True or False."


def test_a_verdict_may_be_a_tensor_of_one_bool():
    for kind in (
        bool,
        torch.tensor,
        lambda found: torch.tensor([found]),
        numpy.bool_,
        lambda found: numpy.array([found]),
    ):
        outcome = grade(exercises.find("3.3"), lambda step, kind=kind: kind(False))
        assert [result.passed for result in outcome.results] == [False, None, None], kind
        assert outcome.results[0].problem == ""


def test_an_error_names_the_call_it_came_from():
    def asserts(step):
        calls.append(step)
        assert len(calls) % 100 < 3
        return True

    calls, question = [], exercises.find("3.3")
    names = [does for does, _ in question.cases(0)[0][0]["steps"]]
    first = grade(question, asserts).results[0]
    assert first.tried == f"a step that {names[2]}"
    assert first.problem.endswith(". A test here returns its verdict: return False instead of asserting.")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a. " * 100, ("a. " * 100).strip()),
        ("One sentence. " + "x" * 300, "One sentence."),
        ("word " * 70, "word " * 60 + "..."),
        ("x" * 301, "x" * 300 + " ..."),
    ],
)
def test_a_long_error_ends_with_a_sentence_or_word(text, shown):
    def answer(x):
        raise RuntimeError(text)

    assert grade(DOUBLE, answer).results[0].problem.endswith(f"RuntimeError: {shown}")


class Rude(Exception):
    def __str__(self):
        raise SystemExit(4)


@pytest.mark.parametrize("error", [SystemExit(3), GeneratorExit(), ZeroDivisionError("a\nb"), Rude()])
def test_nothing_an_answer_raises_gets_out(error):
    def answer(x):
        raise error

    assert grade(DOUBLE, answer).results[0].passed is False


class Odd:
    """Everything that a check could ask of it raises."""

    def __repr__(self):
        raise ValueError("no text")

    __str__ = __format__ = __len__ = __eq__ = __repr__
    __hash__ = None
    __code__ = __name__ = __class__ = property(__repr__)


class OddCall(Odd):
    def __call__(self, x):
        return 2 * x


class OddNumber(float):
    __repr__ = __str__ = __format__ = __eq__ = __sub__ = Odd.__repr__
    __hash__ = float.__hash__


class OddList(list):
    __iter__ = __len__ = __getitem__ = __repr__ = Odd.__repr__


# Made in the test: pytest, too, would ask them for their texts.
ODD = {
    "itself": Odd,
    "what comes back": lambda: lambda x: Odd(),
    "a list": lambda: lambda x: OddList([x]),
    "a key": lambda: lambda x: {Odd: 1},
}


@pytest.mark.parametrize("name", ODD)
def test_what_is_odd_gets_no_points_and_no_error(name):
    outcome = grade(DOUBLE, ODD[name]())
    assert outcome.points == 0
    assert Score(outcome).report
    assert Score(outcome)._repr_html_()


def test_what_is_odd_but_right_gets_full_points():
    assert grade(DOUBLE, OddCall()).points == 3
    assert grade(DOUBLE, lambda x: OddNumber(2 * x)).points == 3


def test_plain_data_has_no_methods_of_its_own():
    number = plain(OddNumber(0.5))
    assert (type(number), number) == (float, 0.5)
    assert plain({"a": (OddList([True, "b", 3]),)}) == {"a": [[True, "b", 3]]}
    with pytest.raises(TypeError, match="This gave an object of type Odd, which is not a number, a text or a list"):
        plain([Odd()])


@pytest.mark.parametrize("given", [None, 4.0, "double"])
def test_something_that_is_no_function(given):
    outcome = grade(DOUBLE, given)
    assert outcome.points == 0
    assert "9.1 takes a function" in outcome.results[0].problem


needs_timer = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timer on this system")


@needs_timer
@pytest.mark.parametrize("swallows", [False, True])
def test_an_endless_answer_is_stopped(swallows):
    def endless(x):
        while True:
            try:
                time.sleep(0.01)
            except Exception:  # the deadline is none
                if not swallows:
                    raise

    started = time.perf_counter()
    outcome = judge(DOUBLE, observe(DOUBLE, endless, seconds=0.2))
    assert time.perf_counter() - started < 5
    assert outcome.results[0].problem == "Stopped after 0.2 seconds: does a loop never end?"
    assert outcome.results[1].passed is None
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


@needs_timer
def test_an_endless_attempt_is_stopped(monkeypatch, capsys):
    monkeypatch.setattr(exercises, "SECONDS", 0.2)
    exercises.attempt(lambda: [time.sleep(0.01) for _ in iter(int, 1)])
    assert capsys.readouterr().out == "Stopped after 0.2 seconds: does a loop never end?\n"


def test_an_interrupt_stops_an_answer_cleanly():
    def interrupted(x):
        raise KeyboardInterrupt

    outcome = grade(DOUBLE, interrupted)
    assert (outcome.points, outcome.note) == (0, "You stopped this check.")


def test_a_check_works_in_a_thread_too():
    found = []
    thread = threading.Thread(target=lambda: found.append(grade(DOUBLE, double).points))
    thread.start()
    thread.join()
    assert found == [3]


def test_prints_and_warnings_are_caught(capfd):
    def noisy(x):
        print("here I am", x)
        print("to stderr", file=sys.stderr)
        warnings.warn("mind the gap", stacklevel=1)
        return 2 * x

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        score = Score(grade(DOUBLE, noisy))
    assert score == 3
    assert caught == []
    assert tuple(capfd.readouterr()) == ("", "")
    assert "here I am 2.0\n" in score.outcome.printed
    assert "to stderr" in score.outcome.printed
    assert "What your code printed" in score._repr_html_()


def test_finished_functions_are_noticed():
    borrowed = [windows]

    def by_another_name(x):
        list(borrowed[0]([1, 2], 1))
        return 2 * x

    outcome = grade(DOUBLE, by_another_name)
    assert outcome.points == 0
    assert outcome.note.startswith("This calls gradaccum's own `windows`")

    def only_named(x):
        return 2 * x if accumulate else None

    assert grade(DOUBLE, only_named).points == 3


def test_a_check_leaves_no_trace():
    def meddles(x):
        torch.manual_seed(5)
        torch.set_default_dtype(torch.float16)
        torch.set_grad_enabled(False)
        return 2 * x

    torch.manual_seed(1)
    before = torch.get_rng_state()
    profile = sys.getprofile()
    grade(DOUBLE, meddles)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()
    assert sys.getprofile() is profile


def test_what_an_answer_makes_itself_is_float64():
    seen = []
    grade(DOUBLE, lambda x: seen.append(torch.zeros(1).dtype))
    assert seen[0] == torch.float64


# ---------------------------------------------------------------------------- what is given is left as it was


def of_model(answer, case):
    import torch

    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    batches = [(torch.ones(2, 2), torch.tensor([1, 0]))]
    answer(model, batches)
    return 0.0


GIVEN = question([Property("it runs", 2, lambda draw: [{}], of_model, lambda case: 0.0, "a model")])


def leaves_evaluation_on(model, batches):
    model[1].eval()


def freezes(model, batches):
    model[0].bias.requires_grad_(False)


def runs_batch_norm(model, batches):
    model(batches[0][0])


def halves(model, batches):
    model.half()


def pops(model, batches):
    batches.pop()


def squeezes(model, batches):
    batches[0][0].unsqueeze_(0)


def overwrites(model, batches):
    batches[0][1].clamp_(max=0)


def switches_off(model, batches):
    torch.set_grad_enabled(False)


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (leaves_evaluation_on, "Afterwards `model`.1 in training mode is False and was True"),
        (freezes, "Afterwards `model`.0.bias.requires_grad is False and was True"),
        (runs_batch_norm, "Afterwards `model`.1.running_mean has other values"),
        (halves, "Afterwards `model`.0.weight.dtype is torch.float16 and was torch.float64"),
        (pops, "Afterwards len of `batches` is 0 and was 1"),
        (squeezes, "Afterwards `batches`[0][0].shape is [1, 2, 2] and was [2, 2]"),
        (overwrites, "Afterwards `batches`[0][1] has other values"),
        (switches_off, "Afterwards gradients being recorded is False and was True"),
    ],
)
def test_what_an_answer_changes_costs_a_point(answer, sentence):
    outcome = grade(GIVEN, answer)
    assert outcome.points == 1
    assert outcome.results[-1].name == LEFT
    assert outcome.results[-1].problem == f"{sentence}: leave the arguments as they were."
    assert "(1 point off)" in Score(outcome).report


def test_weights_and_gradients_may_change():
    def trains(model, batches):
        model[0](batches[0][0]).sum().backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        model.eval()
        model.train()

    assert grade(GIVEN, trains).points == 2


def test_a_generator_is_judged_at_its_end():
    def read(answer, case):
        return list(answer([1, 2]))

    asked = question([Property("it runs", 2, lambda draw: [{}], read, lambda case: [2], "a list")])
    outcome = grade(asked, lambda batches: (batches.pop() for _ in range(1)))
    assert outcome.results[-1].problem.startswith("Afterwards len of `batches` is 1 and was 2")
    assert outcome.points == 1


# ------------------------------------------------------------------------------------------------ find the bug


def hunt(x):
    """Double it."""
    return x * 3


HUNT = question([THE_DOUBLE, at("0 stays 0", 0.0, points=0)], squared, given=hunt)


def test_unchanged_code_is_noticed_in_any_layout():
    namespace = {}
    exec('def hunt(x):\n    """Other words."""\n    # a comment\n    return (x *\n  3)', namespace)
    for answer in (hunt, namespace["hunt"]):
        assert grade(HUNT, answer).note.startswith("Not changed yet")
    outcome = grade(HUNT, lambda x: x * 3.0)
    assert outcome.recognized.answer is hunt, "changed, but still the same mistake"
    assert outcome.mistake == "The bug of the given code is still there."


def test_a_repair_that_breaks_more_earns_nothing():
    assert grade(HUNT, double).points == 2
    outcome = grade(HUNT, lambda x: 2 * x if x else 1.0)
    assert outcome.points == 0
    assert outcome.note.startswith("Something that worked in the given code no longer does")
    assert cards.RED in Score(outcome)._repr_html_().partition(">")[0]
    assert cards.GREY in Score(grade(HUNT, hunt))._repr_html_().partition(">")[0]
    assert [one.passed for one in outcome.results] == [None, False], "a row that says PASS would promise its points"


def test_rows_of_one_mistake_show_it_once():
    wrong = [at("the double", 3.0), at("that of another", 5.0, points=1)]
    first, second = grade(question(wrong, squared), squared.answer).results
    assert first.difference
    assert first.tried
    assert (second.passed, second.problem, second.difference, second.tried) == (False, SAME, None, "")
    first, second = grade(question(wrong, squared), lambda x: x + 1).results
    assert second.difference, "where no mistake explains all rows, each may be another"


# ------------------------------------------------------------------------------------------------ the grader's mutants


def test_a_judge_that_always_says_yes_is_noticed(monkeypatch):
    yes = Property(**{**vars(DOUBLE.properties[0]), "judge": lambda got, expected: None})
    assert grade(question([yes]), squared.answer).points == 2, "so the tests of the questions would fail"


def test_a_wide_tolerance_is_noticed(monkeypatch):
    monkeypatch.setattr(compare, "TOLERANCE", 1e-2)
    assert grade(DOUBLE, lambda x: 2.01 * x).points == 3
    monkeypatch.undo()
    assert grade(DOUBLE, lambda x: 2.01 * x).points == 0


# ------------------------------------------------------------------------------------------------ the learner's side


@pytest.mark.parametrize(
    ("cells", "is_stale"),
    [
        (["def f(x):\n    return x"], False),
        (["def f(x):\n    return x", "def f(x):\n    return x +"], True),
        (["def f(x):\n    return x", "def f(x):\nreturn 2 * x"], True),
        (["def f(x):\n    return x", "def f(x: Missing):\n    return x"], True),
        (["def f(x):\n    return x +", "def f(x):\n    return x"], False),
        (["def f(x):\n    return x", "def f(x):\n    return x +", "def f(x):\n    return x"], False),
        (["def f(x):\n    return x", "def f(x):\n    return x +", "%%time\ndef f(x):\n    return 2 * x"], False),
        (["def f(x):\n    return x\ng = f", "def f(x):\n    return 2 * x", "f = g"], False),
        (["def f(x):\n    return x", "%%script false\ndef f(x):\n    return x +"], False),
        (["import functools", "@functools.cache\ndef f(x):\n    return x", "1 +"], False),
    ],
)
def test_a_card_says_if_a_later_version_failed(cells, is_stale, monkeypatch):
    shell = InteractiveShell(config=Config(HistoryManager={"enabled": False}))
    monkeypatch.setattr(exercises.stale, "get_ipython", lambda: shell)
    with capture_output():
        for cell in cells:
            shell.run_cell(cell, store_history=True)
    score = check("3.2", shell.user_ns["f"])
    said = "Your last cell with `def f(` ended in an error: this is about the version before it."
    assert (said in score.report, score.stale != "") == (is_stale, is_stale)
    assert ("ended in an error" in score._repr_html_()) == is_stale


def test_check_refuses_an_unknown_exercise():
    for given in ("3.9", "9.1", "three", 3.2):
        with pytest.raises(ValueError, match="There is no exercise"):
            check(given, double) if given != 3.2 else check("3.20", double)


def test_an_answer_is_escaped_on_the_page():
    def hostile(x):
        print("<script>alert(1)</script>")
        raise ValueError("<img src=x>")

    card = Score(grade(DOUBLE, hostile))._repr_html_()
    assert "<script" not in card
    assert "<img" not in card
    assert "&lt;script&gt;" in card
    assert "ValueError: &lt;img src=x&gt;" in card


def test_the_verdict_is_a_word_too():
    card = Score(grade(DOUBLE, squared.answer))._repr_html_()
    assert ">FAIL<" in card
    assert ">NOT YET<" in card
    assert ">PASS<" not in card
    assert "This looks like:" in card
    assert squared.sentence in card


def test_the_scorecard_says_what_is_next(monkeypatch):
    monkeypatch.setattr(exercises, "_scores", {})
    monkeypatch.setattr(exercises.progress, "_session", {})
    assert repr(scorecard(3)).startswith("0 of 11 points\n")
    assert "Next: 3.1, A window without a length: run its check." in repr(scorecard(3))
    check("3.1", stub)
    assert "Not there yet: equal micro-batches" in scorecard(3).next_step()
    check("3.2", lambda reduction, sizes: len(sizes) if reduction == "mean" else sum(sizes))
    assert scorecard(3).points == 2
    assert "<table>" in scorecard(3)._repr_html_()
    with pytest.raises(ValueError, match="There is no lesson 9"):
        scorecard(9)


def test_attempt_prints_the_value_or_the_reason(capsys):
    exercises.attempt(double, 4)
    exercises.attempt(stub, 4)
    exercises.attempt(broken, 4)
    assert capsys.readouterr().out == "8\nNot written yet.\nIndexError: list index out of range\n"


def test_solution_and_reset(capsys, monkeypatch, tmp_path):
    with capture_output() as shown:
        exercises.solution("3.2")
    assert "Code" in shown.stdout or shown.outputs or "divisor" in shown.stdout
    exercises.reset("3.2")
    text = capsys.readouterr().out
    assert text.startswith("def divisor(")
    assert "raise NotImplementedError" in text
    monkeypatch.setattr(exercises, "ANSWERS", tmp_path / "answers.json")
    with pytest.raises(FileNotFoundError, match="ask your instructor"):
        exercises.solution("3.2")


def test_gradaccum_imports_no_exercises():
    code = "import sys, gradaccum; print([m for m in sys.modules if 'exercises' in m or m == 'IPython'])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True)
    assert result.stdout.strip() == "[]"
