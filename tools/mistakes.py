"""Make the page that shows which property catches which mistake: python tools/mistakes.py."""

from dataclasses import replace
from pathlib import Path

from gradaccum import exercises
from gradaccum.exercises.judge import grade

PAGE = Path(__file__).resolve().parents[1] / "notebooks" / "exercises" / "MISTAKES.md"
HEAD = """# What the checks catch

**This page spoils the exercises**: to learn from one, write an answer and run its check, which names your own mistake.

Made by `python tools/mistakes.py` and held by a test. For each question: the known mistakes by the name they
have in `gradaccum/exercises/`, the properties (lettered) that each of them fails, and what it still earns.
A dot: holds. An x: fails. A dash: not tried, or does not count.
"""
MARKS = {True: ".", False: "x", None: "-"}


def rows(question):
    """Yield a table row for each mistake, the given code of a bug hunt first."""
    named = [("as given", question.given, "The code that the learner starts from.")] if question.given else []
    named += [(name, each.answer, each.sentence) for name, each in question.mistakes.items()]
    # Without its mistakes: which one it is, is known, and to find it takes minutes.
    plain = replace(question, given=None, mistakes={})
    for name, answer, said in named:
        outcome = grade(plain, answer)
        marks = " | ".join(MARKS[result.passed] for result in outcome.results[: len(question.properties)])
        yield f"| `{name}` | {marks} | {outcome.points} | {said} |"


def page():
    """Return the page as text."""
    parts = [HEAD]
    for lesson in exercises.LESSONS:
        for question in exercises.questions_of(lesson):
            letters = [chr(ord("A") + index) for index in range(len(question.properties))]
            parts.append(f"## {question.id} {question.title}\n")
            pairs = zip(letters, question.properties, strict=True)
            parts += [f"- {letter}: {each.name} ({each.points})" for letter, each in pairs]
            parts.append(f"\n| mistake | {' | '.join(letters)} | of {question.points} | what the learner reads |")
            parts.append("|---|" + "---|" * (len(letters) + 2))
            parts += [*rows(question), ""]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"Wrote {PAGE.name}.")
