"""The state of a training."""

import torch

from internals.train_state import TrainState


def make_state(**settings) -> TrainState:
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, **settings)
    return TrainState(model, optimizer, learning_rate=lambda step: 0.1)


def test_optimizer_has_the_settings_of_the_run_and_the_state_of_the_checkpoint():
    before = make_state(momentum=0.9, weight_decay=0.1)
    before.model(torch.ones(1, 2)).sum().backward()
    before.optimizer.step()
    state = make_state(momentum=0.5, weight_decay=0.2)
    state.load_state_dict(before.state_dict())
    [group] = state.optimizer.param_groups
    assert (group["momentum"], group["weight_decay"]) == (0.5, 0.2)
    buffers = [
        [s.optimizer.state[p]["momentum_buffer"] for p in s.model.parameters()]
        for s in (before, state)
    ]
    assert all(map(torch.equal, *buffers))
