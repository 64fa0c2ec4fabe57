"""1.3: predict the noise of another batch size."""

from gradaccum.exercises import material
from gradaccum.exercises.question import Property, Question, mistake


def predicted(answer, case):
    return material.number(answer(case["noise"], case["batch_size"], case["new_batch_size"]))


def one_over_square_root(case):
    noise_of_one_row = case["noise"] * case["batch_size"] ** 0.5
    return noise_of_one_row / case["new_batch_size"] ** 0.5


def measured_at(*pairs):
    def cases(draw):
        noises = [draw.uniform(0.2, 3.0) for _ in pairs]
        return [
            {"noise": one, "batch_size": n, "new_batch_size": new} for one, (n, new) in zip(noises, pairs, strict=True)
        ]

    return cases


def predicts(name, *pairs):
    asked = "noise {noise} with batches of {batch_size}, predicted for batches of {new_batch_size}"
    return Property(name, 1, measured_at(*pairs), predicted, one_over_square_root, asked)


QUESTION = Question(
    "The noise of another batch",
    (
        predicts("from one row to a batch", (1, 50), (1, 2), (1, 1)),
        predicts("from any batch to a larger or smaller one", (8, 128), (32, 6), (6, 15), (7, 7)),
    ),
)


@mistake("The noise is divided by how many times larger the batch is; it falls as one over the square root of that.")
def one_over_size(noise, batch_size, new_batch_size):
    return noise * batch_size / new_batch_size


@mistake("The two sizes are the wrong way round, so that the larger batch is the noisier one; it is the quieter one.")
def wrong_way_round(noise, batch_size, new_batch_size):
    return noise * (new_batch_size / batch_size) ** 0.5


@mistake(
    "The two sizes are the wrong way round, and the root is missing; a larger batch is quieter, by the square root of "
    "how many times larger it is."
)
def wrong_way_without_root(noise, batch_size, new_batch_size):
    return noise * new_batch_size / batch_size


@mistake("This takes half and no root, as x ** 1 / 2 does, where ** comes first; write x ** 0.5, or x ** (1 / 2).")
def halved(noise, batch_size, new_batch_size):
    return noise * (batch_size / new_batch_size) ** 1 / 2


@mistake("The root is taken of the noise too; it belongs to the sizes alone.")
def root_of_all(noise, batch_size, new_batch_size):
    return (noise * batch_size / new_batch_size) ** 0.5


@mistake("The root is taken of the old batch size alone; take it of both sizes, or of their ratio.")
def root_of_old_size(noise, batch_size, new_batch_size):
    return noise * batch_size**0.5 / new_batch_size


@mistake(
    "A smaller batch comes out as noisy as the old one; the rule holds in both directions: a smaller batch is noisier."
)
def never_noisier(noise, batch_size, new_batch_size):
    return noise / max(1, new_batch_size / batch_size) ** 0.5


@mistake("A smaller batch comes out quieter than the old one; it is noisier, so the ratio must not be inverted.")
def always_quieter(noise, batch_size, new_batch_size):
    sizes = batch_size, new_batch_size
    return noise * (min(sizes) / max(sizes)) ** 0.5


@mistake("This is the square of the noise; the noise itself falls as one over the square root of the batch size.")
def squared(noise, batch_size, new_batch_size):
    return noise**2 * batch_size / new_batch_size


@mistake(
    "The noise given is taken for that of one row; it is that of batch_size rows, so what counts is how many times "
    "larger the new batch is."
)
def as_if_of_one_row(noise, batch_size, new_batch_size):
    return noise / new_batch_size**0.5


@mistake("The noise is returned unchanged; a larger batch is quieter.")
def unchanged(noise, batch_size, new_batch_size):
    return noise
