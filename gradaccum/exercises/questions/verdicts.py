"""For questions that ask for a test: what it calls training steps, right and wrong ones mixed."""

import ast

from gradaccum.exercises import material
from gradaccum.exercises.compare import Difference
from gradaccum.exercises.question import Property


def verdicts(answer, case):
    """Ask a learner's test about each step, in the order of the case."""
    return [material.verdict(answer, text, does) for does, text in case["steps"]]


def text_of(fill):
    """Return a function's text, without the decorator that makes it a known mistake."""
    tree = ast.parse(material.text_of(fill))
    (function,) = tree.body
    function.decorator_list = [each for each in function.decorator_list if not ast.unparse(each).startswith("mistake(")]
    return ast.unparse(tree)


def asking(right, wrong):
    """Return what makes a property of a learner's test: that it calls some of these steps what they are.

    Each step is a way to fill `.grad`, under what it does. All right ones or all wrong ones come, with one to three of
    the others and in an order drawn from the seed, so that no count of the calls tells them apart. The steps that are
    not asked about serve to recognize a mistake, by all that it lets pass.
    """
    texts = {does: text_of(fill) for does, fill in {**right, **wrong}.items()}

    def calls(name, points, asked, tried, after):
        ours, others = (wrong, right) if asked.keys() <= wrong.keys() else (right, wrong)

        def cases(draw):
            steps = [*ours, *draw.sample([*others], draw.randrange(1, 4))]
            return [{"steps": [[each, texts[each]] for each in draw.sample(steps, len(steps))]}]

        def expected(case):
            return [(does in right, does) for does, _ in case["steps"]]

        def judge(got, expected):
            said = {True: "right", False: "wrong"}
            for verdict, (wanted, what) in zip(got, expected, strict=True):
                if what in asked and verdict != wanted:
                    return Difference(
                        f"{said[wanted]}, for every such step", f"{said[verdict]}, for a step that {what}"
                    )
            return None

        return Property(name, points, cases, verdicts, expected, tried, judge, after)

    return calls
