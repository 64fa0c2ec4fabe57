"""6.3: further right answers, which must get full points, and wrong ones, which must not."""


def ledger(gradients, activations, temporaries, accumulation_steps):
    """Walks through the update, moment by moment."""

    def peak(steps):
        held, worst = 0, 0
        for _ in range(steps):
            worst, held = max(worst, held + activations), gradients
        return max(worst, held + temporaries)

    return float(peak(accumulation_steps) - peak(1))


def by_cases(gradients, activations, temporaries, accumulation_steps):
    if accumulation_steps == 1 or activations <= temporaries:
        return 0
    return min(gradients, activations - temporaries)


def free(gradients, activations, temporaries, accumulation_steps):
    return 0


def step_forgotten(gradients, activations, temporaries, accumulation_steps):
    return min(gradients, activations) if accumulation_steps > 1 else 0


RIGHT = [ledger, by_cases]
WRONG = [free, step_forgotten, lambda *held: str(by_cases(*held)), lambda *held: (held[3] > 1) * (held[1] - held[2])]
