"""What the questions of lesson 1 share: the mean loss, as the oracles compute it and as the mistakes do."""

from torch.nn.functional import cross_entropy


def mean_loss(model, inputs, targets):
    """The mean loss, token by token."""
    pairs = zip(inputs.flatten(), targets.flatten(), strict=True)
    losses = [-model(token[None])[0].log_softmax(0)[target] for token, target in pairs]
    return sum(losses) / len(losses)


def loss_of(model, inputs, targets, reduction="mean"):
    """For the mistakes, whose loss is right but where they say so."""
    return cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), reduction=reduction)
