"""Members of an ensemble are computed together, as they would be alone."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from fusion.nn.batch import Batch
from fusion.nn.draws import random_rows
from fusion.nn.members import Member
from fusion.nn.price_model import PriceModel, _allowed
from tests.small_models import BEST, PUBLISHED, batch_for, build

ENSEMBLE = {"folds": 3, "seeds": 2}
N_MEMBERS, N_ROWS = 6, 32
MODELS = {
    "neighbours": ("all", "concat", BEST),
    "components": ("all", "concat", {**BEST, "neighbours": 0}),
    "attention of all": ("all", "fusion", BEST),
    "attention of a pair": ("pair", "fusion", PUBLISHED),
    "published": ("all", "fusion", PUBLISHED),
}
each_model = pytest.mark.parametrize(("variant", "network", "settings"), MODELS.values(), ids=MODELS)


def made(variant: str, network: str, settings: dict[str, Any], **more: Any) -> tuple[PriceModel, Batch]:
    """An ensemble, and rows in three parts."""
    model = build(variant, network, **{**settings, **ENSEMBLE, **more})
    rows = batch_for(model, N_ROWS)
    inputs = model.inputs(rows.inputs, rows.present)
    batch = Batch(inputs, rows.present, folds=torch.arange(N_ROWS) % 3, groups=torch.arange(N_ROWS), is_projected=True)
    return model, batch


def alone(model: PriceModel, number: int) -> dict[str, Tensor]:
    """The state dict of a model of one member of the ensemble."""
    state, own = model.state_dict(), f"members.{number}."
    shared = {name: value for name, value in state.items() if not name.startswith("members.")}
    return shared | {f"members.0.{name[len(own) :]}": value for name, value in state.items() if name.startswith(own)}


def gradients(member: Member) -> dict[str, Tensor]:
    return {name: weight.grad for name, weight in member.named_parameters() if weight.grad is not None}


@each_model
def test_members_are_computed_as_if_alone(variant: str, network: str, settings: dict[str, Any]) -> None:
    """Outputs and gradients, without dropout."""
    still = dict.fromkeys(("dropout", "input_dropout", "input_noise", "modality_dropout", "neighbour_dropout"), 0.0)
    model, batch = made(variant, network, settings, **still)
    outputs = model.train()(batch)
    total(outputs).backward()
    for number in range(N_MEMBERS):
        single = build(variant, network, **{**settings, **still, "folds": 3, "fold": number // 2})
        single.load_state_dict(alone(model, number))
        own = single.train()(batch)
        torch.testing.assert_close(outputs.price[:, number], own.price[:, 0])
        total(own).backward()
        joint = gradients(model.members.member)
        assert joint.keys() == gradients(single.members.member).keys()
        for name, gradient in gradients(single.members.member).items():
            torch.testing.assert_close(joint[name][number], gradient, rtol=1e-4, atol=1e-5)


@each_model
def test_dropout_of_members_computed_together_is_that_of_each(
    variant: str, network: str, settings: dict[str, Any]
) -> None:
    """Each member has its own random numbers, the same whether members are computed together or one by one."""
    model, batch = made(variant, network, {**settings, "input_dropout": 0.3, "input_noise": 0.3})
    with drawn():
        together = model.train()(batch).price
    found = model._candidates(batch, batch.inputs)
    for number in range(N_MEMBERS):

        def target(member: Member, held_out: int | Tensor) -> Tensor:
            return model._member_output(member, batch.inputs, batch.present, _allowed(found, held_out, batch)).target

        with drawn():
            one_by_one = model.members.one(number, target)
        torch.testing.assert_close(together[:, number], one_by_one.float())


def test_members_of_equal_weights_differ_by_their_dropout() -> None:
    model, batch = made("all", "concat", BEST)
    for weight in model.members.parameters():
        weight.data.copy_(weight.data[:1].expand_as(weight.data))
    prices = model.train()(batch).price
    assert len(prices.unique(dim=1).T) == N_MEMBERS
    prices = model.eval()(batch).price
    torch.testing.assert_close(prices[:, 0::2], prices[:, 1::2])


@pytest.mark.parametrize("cuts", [(0, 32), (0, 11, 22, 32), (0, 1, 2, 32)])
def test_dropout_of_members_does_not_depend_on_the_number_of_ranks(cuts: tuple[int, ...]) -> None:
    model, batch = made("all", "concat", BEST)
    model.train()
    with drawn():
        whole = model(batch).price
    parts = []
    for rows in (slice(start, end) for start, end in pairwise(cuts)):
        with random_rows(5, rows, N_ROWS, torch.device("cpu")):
            parts.append(model(rows_of(batch, rows)).price)
    torch.testing.assert_close(torch.cat(parts), whole)


def test_the_state_dict_lists_the_members() -> None:
    model, _ = made("all", "concat", BEST)
    state = model.state_dict()
    single = build("all", "concat", **BEST)
    assert {name for name in state if name.startswith("members.4.")} == {
        name.replace("members.0.", "members.4.") for name in single.state_dict() if name.startswith("members.")
    }
    again = build("all", "concat", **BEST, **ENSEMBLE)
    with torch.no_grad():
        for weight in again.parameters():
            weight.add_(1)
    again.load_state_dict(state)
    assert again.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())


def test_each_member_starts_with_its_own_weights() -> None:
    weights = build("all", "concat", **BEST, **ENSEMBLE).members.member.network.head.layers[0].weight
    assert len(weights) == N_MEMBERS and len(weights.unique(dim=0)) == N_MEMBERS


def test_gradients_are_clipped_per_member() -> None:
    model, batch = made("all", "concat", BEST)
    weights = torch.logspace(-3, 3, N_MEMBERS)
    (model.train()(batch).price * weights).sum().backward()
    before = flat(model)
    model.members.clip_gradients(1.0)
    after, norms = flat(model), before.norm(dim=1)
    assert (norms < 1).any() and (norms > 1).any()
    torch.testing.assert_close(after, before * (1 / (norms + 1e-6)).clamp(max=1).unsqueeze(1))


def flat(model: PriceModel) -> Tensor:
    """[M, n] gradients of each member."""
    return torch.cat([one.flatten(1) for one in gradients(model.members.member).values()], dim=1)


def drawn() -> Any:
    return random_rows(5, slice(0, N_ROWS), N_ROWS, torch.device("cpu"))


def rows_of(batch: Batch, rows: slice) -> Batch:
    inputs, present = ({role: one[rows] for role, one in part.items()} for part in (batch.inputs, batch.present))
    assert batch.folds is not None and batch.groups is not None
    return replace(batch, inputs=inputs, present=present, folds=batch.folds[rows], groups=batch.groups[rows])


def total(outputs: Any) -> Tensor:
    return outputs.price.sum() + (0 if outputs.neighbours is None else outputs.neighbours.square().sum())
