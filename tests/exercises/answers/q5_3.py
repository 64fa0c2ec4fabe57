"""5.3: further right answers, which must get full points, and wrong ones, which must not."""

import fills

RIGHT = fills.RIGHT
WRONG = fills.WRONG
# Mutants of the reference answer that are right too, and why.
EQUIVALENT = {"11: loss.item() -> loss": "a number in a tensor is a number, and the graph was freed by backward"}
