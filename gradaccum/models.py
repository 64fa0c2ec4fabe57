"""The models of the lessons: `Embedding` + `Linear`, and a small GPT that can be read in one sitting."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from gradaccum import data


def embedding_linear(vocabulary: int = 1000, width: int = 128) -> nn.Sequential:
    """Return the first lesson's model, which predicts the next token from the last token alone.

    Args:
        vocabulary: V, the number of different tokens.
        width: d, the size of the embedding.

    Returns:
        A module from int64 tokens of shape (batch, length) to logits of shape (batch, length, V).
        It has 2Vd + V parameters.

    Example:
        >>> model = embedding_linear()
        >>> sum(parameter.numel() for parameter in model.parameters())
        257000
    """
    return nn.Sequential(nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary))


def for_names(length: int | None = None, width: int = 32) -> tuple[list[str], data.Characters, nn.Sequential]:
    """Return what most sections of the lessons start with: shuffled names, their characters, and a model of seed 0.

    Args:
        length: use only names of exactly this many characters; None for all names.
        width: d, as in `embedding_linear`.

    Returns:
        The names, the `Characters` that encode them, and the model, whose initial weights are the same in each call.

    Example:
        >>> names, characters, model = for_names(length=18)
        >>> inputs, targets = characters.batch(names[:8])
        >>> model(inputs).shape
        torch.Size([8, 19, 29])
    """
    names = data.shuffled(data.character_names(length), seed=0)
    characters = data.Characters(names)
    torch.manual_seed(0)
    return names, characters, embedding_linear(len(characters), width)


class Block(nn.Module):
    """One layer of the GPT: causal self-attention, then an MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, length, width) to the same shape."""
        batch, length, width = x.shape
        qkv = self.query_key_value(self.attention_norm(x))
        query, key, value = qkv.view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.projection(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(x)  # type: ignore[no-any-return]


class GPT(nn.Module):
    """A small causal transformer, pre-norm, with learned positions and no dropout.

    Without dropout and BatchNorm its gradient depends only on the data, so that two ways to split a batch can be
    compared to rounding. Padding after a line does not affect the line.

    Args:
        vocabulary: V, the number of different tokens.
        context: the longest input, in tokens.
        width: d, the size of the hidden state; a multiple of `heads`.
        layers: the number of blocks.
        heads: attention heads in a block.

    Raises:
        ValueError: `width` is not a multiple of `heads`.

    Example:
        >>> model = GPT(vocabulary=40, context=16, width=32, layers=1, heads=2)
        >>> model(torch.zeros(3, 10, dtype=torch.int64)).shape
        torch.Size([3, 10, 40])
    """

    def __init__(self, vocabulary: int, context: int = 96, width: int = 64, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"The width {width} must be a multiple of the number of heads, {heads}.")
        self.context = context
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.position_embedding = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map int64 tokens (batch, length) to logits (batch, length, vocabulary)."""
        length = tokens.shape[1]
        if length > self.context:
            raise ValueError(f"The input is {length} tokens long, but the model's context is {self.context} at most.")
        positions = torch.arange(length, device=tokens.device)
        x = self.token_embedding(tokens) + self.position_embedding(positions)
        return self.head(self.norm(self.blocks(x)))  # type: ignore[no-any-return]

    @torch.no_grad()
    def invent(self, samples: int, *, seed: int, temperature: float = 0.6) -> Tensor:
        """Sample lines from the model, token by token.

        Args:
            samples: the number of lines.
            seed: determines the lines; the global random state is not used.
            temperature: 1 samples from the predicted distribution; a lower value prefers likely tokens.

        Returns:
            int64 tokens of shape (samples, at most context); a line ends at its first 0.
        """
        device = self.token_embedding.weight.device
        generator = torch.Generator().manual_seed(seed)  # on the CPU, so that every device draws the same
        tokens = torch.zeros(samples, 1, dtype=torch.int64, device=device)
        for _ in range(self.context):
            likely = (self(tokens[:, -self.context :])[:, -1] / temperature).softmax(-1)
            tokens = torch.cat([tokens, torch.multinomial(likely.cpu(), 1, generator=generator).to(device)], dim=1)
            if bool((tokens[:, 1:] == 0).any(1).all()):
                break
        return tokens[:, 1:]
