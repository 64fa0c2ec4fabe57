"""The lessons' models: what the comparisons of gradients rely on, and that they learn."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gradaccum.data import Characters, character_names, shuffled
from gradaccum.models import GPT, Block, embedding_linear


@pytest.fixture(scope="module")
def gpt() -> GPT:
    torch.manual_seed(0)
    return GPT(vocabulary=12, context=10, width=16, layers=2, heads=4)


def test_embedding_linear_is_the_first_lessons_model():
    model = embedding_linear()
    assert [type(part) for part in model] == [nn.Embedding, nn.Linear]
    assert sum(parameter.numel() for parameter in model.parameters()) == 257_000
    small = embedding_linear(vocabulary=7, width=3)
    assert sum(parameter.numel() for parameter in small.parameters()) == 2 * 7 * 3 + 7
    assert small(torch.zeros(2, 5, dtype=torch.int64)).shape == (2, 5, 7)


def test_a_later_token_changes_no_earlier_logits(gpt):
    tokens = torch.randint(12, (3, 10), generator=torch.Generator().manual_seed(0))
    logits = gpt(tokens)
    assert logits.shape == (3, 10, 12)
    for position in range(10):
        other = tokens.clone()
        other[:, position] = (other[:, position] + 1) % 12
        changed = (gpt(other) - logits).abs().amax(-1)
        assert changed[:, :position].sum() < 1e-5
        assert changed[:, position:].min() > 1e-4  # and each position sees all that came before


def test_padding_behind_a_line_changes_nothing_before_it(gpt):
    tokens = torch.randint(12, (3, 6), generator=torch.Generator().manual_seed(0))
    padded = torch.cat([tokens, torch.zeros(3, 4, dtype=torch.int64)], dim=1)
    torch.testing.assert_close(gpt(padded)[:, :6], gpt(tokens), rtol=0, atol=1e-6)
    torch.testing.assert_close(gpt(tokens)[1:2], gpt(tokens[1:2]), rtol=0, atol=1e-6)  # nor do the other lines


def test_a_position_makes_a_difference(gpt):
    logits = gpt(torch.ones(1, 5, dtype=torch.int64))[0]
    assert (logits[1:] - logits[:-1]).abs().amax(-1).min() > 1e-3


def test_a_block_adds_to_what_came_in():
    block = Block(width=4, heads=2)
    for parameter in [*block.projection.parameters(), *block.mlp[-1].parameters()]:
        nn.init.zeros_(parameter)
    x = torch.randn(2, 3, 4)
    assert torch.equal(block(x), x)


def test_the_gpt_refuses(gpt):
    with pytest.raises(ValueError, match=r"width 10 .* heads, 4"):
        GPT(vocabulary=12, width=10, heads=4)
    with pytest.raises(ValueError, match=r"11 tokens long.* 10 at most"):
        gpt(torch.zeros(1, 11, dtype=torch.int64))


def test_invented_lines_depend_on_the_seed_alone(gpt):
    before = torch.get_rng_state()
    first = gpt.invent(5, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(gpt.invent(5, seed=3), first)
    assert not torch.equal(gpt.invent(5, seed=4), first)
    assert gpt.training
    assert first.dtype == torch.int64
    assert 0 <= int(first.min()) <= int(first.max()) < 12
    ends = (first == 0).any(1)
    assert first.shape == (5, 10) if not ends.all() else first.shape[1] <= 10
    assert 0 < ends.sum() < 5  # so that the line above says something


def test_inventing_goes_on_until_every_line_has_ended():
    model = GPT(vocabulary=3, context=6, width=4, layers=1, heads=1)
    with torch.no_grad():
        model.norm.bias.fill_(1.0)
        model.norm.weight.zero_()  # the head alone decides, the same at each position
        for wanted, length in ((2, 6), (0, 1)):
            model.head.weight.zero_()
            model.head.weight[wanted] = 100.0
            assert model.invent(4, seed=0).tolist() == [[wanted] * length] * 4


def test_the_temperature_sharpens():
    model = GPT(vocabulary=3, context=40, width=4, layers=1, heads=1)
    with torch.no_grad():
        model.norm.bias.fill_(1.0)
        model.norm.weight.zero_()
        model.head.weight.copy_(torch.tensor([-9.0, 0.25, 0.0]).view(3, 1).expand(3, 4))  # e to 1 for token 1
        shares = [float((model.invent(25, seed=0, temperature=t) == 1).float().mean()) for t in (1.0, 0.2)]
    assert shares == pytest.approx([0.731, 0.993], abs=0.05)


def test_the_gpt_learns_names_in_a_few_updates():
    names = shuffled(character_names(), seed=0)
    characters = Characters(names)
    torch.manual_seed(0)
    model = GPT(len(characters), width=32, layers=1, heads=2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    def mean_loss(lines):
        inputs, targets = characters.batch(lines)
        return cross_entropy(model(inputs).transpose(1, 2), targets)

    held_out = names[-200:]
    untrained = float(mean_loss(held_out).detach())
    assert untrained == pytest.approx(torch.tensor(len(characters)).log().item(), abs=0.3)
    for update in range(40):
        mean_loss(names[32 * update : 32 * update + 32]).backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = float(mean_loss(held_out).detach())
    assert trained < 2.7  # 2.42 when written; 3.01 is what the characters' frequencies alone give
    lines = [characters.decode(row) for row in model.invent(20, seed=0).tolist()]
    assert sum(map(len, lines)) / 20 < 60  # most lines come to an end
