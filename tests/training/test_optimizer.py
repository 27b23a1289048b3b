import copy

import pytest
import torch
from fastai.optimizer import Adam
from torch import nn

from bloodcell_fastai.training.optimizer import FusedAdam


def groups(model):
    return [list(model[0].parameters()), list(model[2].parameters())]


@pytest.fixture
def twins():
    """One network twice, with fastai's optimizer and with ours; the biases do not decay."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    pairs = []
    for make in (Adam, FusedAdam):
        twin = copy.deepcopy(model)
        optimizer = make(groups(twin), lr=0.01, wd=0.1)
        for layer in (twin[0], twin[2]):
            optimizer.state[layer.bias]["do_wd"] = False
        pairs.append((twin, optimizer))
    return pairs


def train(model, optimizer, steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(16, 6, generator=generator)
        model(x).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def same(one, other):
    return all(
        torch.allclose(a, b, atol=1e-6)
        for a, b in zip(one.parameters(), other.parameters(), strict=True)
    )


def test_it_takes_fastais_steps(twins):
    (theirs, their_adam), (ours, our_adam) = twins
    for optimizer in (their_adam, our_adam):
        optimizer.set_hypers(lr=[0.001, 0.01], mom=0.8)
    start = copy.deepcopy(ours)
    for model, optimizer in twins:
        train(model, optimizer, 20)
    assert same(theirs, ours)
    assert not same(start, ours)


def test_frozen_parameters_stay(twins):
    model, optimizer = twins[1]
    before = copy.deepcopy(model)
    optimizer.freeze_to(1)
    train(model, optimizer, 3)
    assert torch.equal(model[0].weight, before[0].weight)
    assert not torch.equal(model[2].weight, before[2].weight)


def test_it_goes_on_from_its_state(twins):
    model, optimizer = twins[1]
    train(model, optimizer, 5)
    other = copy.deepcopy(model)
    again = FusedAdam(groups(other), lr=0.01, wd=0.1)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, 5, seed=2)
    train(other, again, 5, seed=2)
    assert same(model, other)


def test_a_parameter_without_a_gradient_is_passed_over():
    unused = nn.Parameter(torch.ones(2))
    optimizer = FusedAdam([unused], lr=1.0)
    optimizer.step()
    assert unused.tolist() == [1, 1]


def test_the_layout_in_memory_does_not_matter():
    """A model may become channels-last after its optimizer's state was made or loaded."""
    torch.manual_seed(0)
    plain = nn.Conv2d(4, 6, 3)
    twins = [(plain, FusedAdam(plain.parameters(), lr=0.01))]
    twin = copy.deepcopy(plain)
    twins.append((twin, FusedAdam(twin.parameters(), lr=0.01)))
    x = torch.randn(8, 4, 5, 5)
    for turn in range(2):
        for model, optimizer in twins:
            model(x).pow(2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        if turn == 0:
            twin.to(memory_format=torch.channels_last)
    assert same(plain, twin)
