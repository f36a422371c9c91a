from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusion.all_embeddings.config import Config as AllConfig
from fusion.all_embeddings.model import build_network as build_all
from fusion.nn.batch import Batch
from fusion.nn.draws import random_rows
from fusion.nn.layers import Attention, Branch, ConcatNetwork, RowDropout
from fusion.nn.price_model import PriceModel
from fusion.qwen_clip.config import Config as PairConfig
from fusion.qwen_clip.model import build_network as build_pair
from tests.small_models import BEST, PUBLISHED, batch_for, build, some_without_neighbours, take, target

CPU = torch.device("cpu")
PUBLISHED_DIMS = {"clip_image": 768, "siglip_image": 1152, "siglip_text": 1024, "qwen_text": 1027}
RECIPES = {"published": PUBLISHED, "neighbours": BEST}
KINDS = [
    (variant, model, recipe) for variant in ("all", "pair") for model in ("fusion", "concat") for recipe in RECIPES
]


@pytest.fixture(params=KINDS, ids="-".join)
def model(request: pytest.FixtureRequest) -> PriceModel:
    variant, kind, recipe = request.param
    return build(variant, kind, **RECIPES[recipe])


def test_a_prediction_does_not_depend_on_the_other_rows(model: PriceModel) -> None:
    model.eval()
    batch = batch_for(model)
    together = target(model, batch)
    alone = torch.cat([target(model, take(batch, slice(i, i + 1))) for i in range(32)])
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-6)
    assert together.std() > 1e-4


def test_every_parameter_gets_a_gradient(model: PriceModel) -> None:
    model.train()
    found = model(some_without_neighbours(model, batch_for(model)))
    torch.stack([(one - 1).square().mean() for one in vars(found).values() if one is not None]).sum().backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not (p.grad != 0).any()]
    assert dead == []


@pytest.mark.parametrize("n_rows", [1, 2])
def test_gradients_have_the_strides_of_their_parameters(n_rows: int, model: PriceModel) -> None:
    """DDP warns of others, on every rank, and copies them."""
    model.train()(batch_for(model, n_rows)).price.square().mean().backward()
    gradients = [(name, p.stride(), p.grad.stride()) for name, p in model.named_parameters() if p.grad is not None]
    assert [each for each in gradients if each[1] != each[2]] == []


@pytest.mark.parametrize("variant", ["all", "pair"])
def test_every_query_gets_a_gradient_above_rounding(variant: str) -> None:
    model = build(variant, "fusion", **PUBLISHED).eval()
    target(model, batch_for(model)).square().mean().backward()
    queries = [module.query.weight.grad for module in model.modules() if isinstance(module, Attention)]
    assert len(queries) == (4 if variant == "all" else 2)
    assert [grad for grad in queries if grad is None or grad.abs().max() < 1e-9] == []


def test_attention_weights_vary_between_rows() -> None:
    torch.manual_seed(0)
    attention = Attention(16, 2, 0.0)
    x, context = torch.randn(20, 3, 16), torch.randn(20, 4, 16)
    weights = attention.weights(x, context)
    assert weights.shape == (20, 2, 3, 4)
    torch.testing.assert_close(weights.sum(-1), torch.ones(20, 2, 3))
    assert weights.std(0).min() > 1e-3


def test_attention_equals_torchs_own() -> None:
    torch.manual_seed(0)
    ours, theirs = Attention(16, 2, 0.0), nn.MultiheadAttention(16, 2, batch_first=True)
    theirs.in_proj_weight.data = torch.cat([ours.query.weight, ours.key_value.weight]).detach()
    theirs.in_proj_bias.data = torch.cat([ours.query.bias, ours.key_value.bias]).detach()
    theirs.out_proj.load_state_dict(ours.out.state_dict())
    x, context = torch.randn(5, 3, 16), torch.randn(5, 4, 16)
    normed = ours.norm_context(context)
    expected = x + theirs(ours.norm_x(x), normed, normed)[0]
    torch.testing.assert_close(ours(x, context), expected)


@pytest.mark.parametrize("variant", ["all", "pair"])
def test_the_gate_varies_and_uses_every_expert(variant: str) -> None:
    model = build(variant, "fusion", **PUBLISHED).eval()
    gate = model.explained(batch_for(model, 256))["gate"]
    assert gate.shape == (256, 3)
    torch.testing.assert_close(gate.sum(1), torch.ones(256))
    assert gate.std(0).min() > 1e-3
    assert gate.mean(0).min() > 0.05


def test_a_branch_is_not_linear_and_its_settings_count() -> None:
    torch.manual_seed(0)
    branch, there = Branch(6, 16, 2, 0.5).eval(), torch.ones(10, dtype=torch.bool)
    x, y = torch.randn(10, 6), torch.randn(10, 6)
    zero = branch(torch.zeros(10, 6), there)
    assert (branch(x + y, there) - branch(x, there) - branch(y, there) + zero).abs().max() > 0.1
    assert not torch.equal(branch.train()(x, there), branch.eval()(x, there))
    without_residual = branch.norm(branch.views(branch.project(x)).view(10, 2, 16))
    assert (branch(x, there) - without_residual).abs().max() > 0.1
    torch.testing.assert_close(branch(x, there).mean(-1), torch.zeros(10, 2), atol=1e-5, rtol=0)  # normed


@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_a_branch_is_projection_norm_gelu_dropout_and_then_a_residual_view(dropout: float) -> None:
    torch.manual_seed(0)
    branch, there = Branch(6, 16, 2, dropout), torch.ones(200, dtype=torch.bool)
    x, linear = torch.randn(200, 6), branch.project[0]
    active = nn.functional.gelu(nn.functional.layer_norm(linear(x), (16,)))
    with random_rows(3, slice(0, 200), 200, CPU):
        kept = RowDropout(dropout)(active)
    for hidden, training in ((active, False), (kept, True)):
        tokens = hidden.unsqueeze(1) + branch.views(hidden).view(200, 2, 16)
        with random_rows(3, slice(0, 200), 200, CPU):
            found = branch.train(training)(x, there)
        torch.testing.assert_close(found, nn.functional.layer_norm(tokens, (16,)))


def test_a_missing_source_is_replaced_by_learned_tokens(model: PriceModel) -> None:
    model.eval()
    batch = batch_for(model, missing=0.0)
    role = next(iter(batch.inputs))
    absent = batch.present | {role: torch.zeros(32, dtype=torch.bool)}
    noise = batch.inputs | {role: torch.full_like(batch.inputs[role], float("nan"))}
    without = target(model, Batch(batch.inputs, absent))
    assert (without - target(model, batch)).abs().max() > 1e-4
    torch.testing.assert_close(target(model, Batch(noise, absent)), without)


def test_a_row_without_any_embedding_gets_the_training_median(model: PriceModel) -> None:
    targets = torch.log1p(torch.tensor([5.0, 20.0, 400.0]))
    model.calibrate({}, targets)
    inputs = batch_for(model).inputs
    nothing = {role: torch.zeros(32, dtype=torch.bool) for role in inputs}
    torch.testing.assert_close(model.eval().price(Batch(inputs, nothing)), torch.full((32,), 20.0).double())


def test_the_output_starts_at_the_training_median(model: PriceModel) -> None:
    targets = torch.log1p(torch.tensor([5.0, 20.0, 400.0]))
    model.calibrate({}, targets)
    start = target(model.eval(), batch_for(model))
    assert (start - targets.median()).abs().median() < 2 * targets.std()


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_constant_columns_are_ignored(recipe: dict[str, Any]) -> None:
    model = build("all", "fusion", **recipe).eval()
    role, dim = "clip_image", model.dims["clip_image"]
    rows = torch.randn(100, dim)
    rows[:, 0], rows[:, 1] = 3.0, 3.0 + 1e-9 * torch.randn(100)
    model.calibrate({role: (rows.mean(0), rows.std(0))}, 3 + torch.rand(100))
    batch = batch_for(model, missing=0.0)
    batch.inputs[role] = rows[:32].clone()
    before = target(model, batch)
    batch.inputs[role][:, :2] += 0.5  # a test row may have values that no training row had
    torch.testing.assert_close(target(model, batch), before)
    batch.inputs[role][:, 2] += 0.5
    assert (target(model, batch) - before).abs().max() > 1e-5


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize(("value", "noise"), [(0.0, 1e-9), (3.0, 1e-6)], ids=["std 1e-9", "rounding of 3"])
def test_nearly_constant_columns_are_ignored(value: float, noise: float, recipe: dict[str, Any]) -> None:
    model = build("all", "fusion", **recipe).eval()
    role, dim = "clip_image", model.dims["clip_image"]
    rows = torch.randn(100, dim)
    rows[:, 0] = value + noise * torch.randn(100)
    assert rows[:, 0].std() > 0
    model.calibrate({role: (rows.mean(0), rows.std(0))}, 3 + torch.rand(100))
    batch = batch_for(model, missing=0.0)
    batch.inputs[role] = rows[:32].clone()
    before = target(model, batch)
    batch.inputs[role][:, 0] += 0.5
    torch.testing.assert_close(target(model, batch), before)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_modality_dropout_never_hides_all_roles_of_a_row(recipe: dict[str, Any]) -> None:
    model = build("all", "concat", modality_dropout=0.4, **{**recipe, "dropout": 0.0})
    seen = []
    model.members.member.network.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[1]))
    batch = batch_for(model, 500, missing=0.5)
    model.train()(batch)
    before, after = (torch.stack([present[role] for role in model.dims]) for present in (batch.present, seen[0]))
    assert torch.equal(before.any(0), after.any(0))
    assert not (after & ~before).any()
    assert after.sum() < 0.85 * before.sum()


@pytest.mark.parametrize("cuts", [(0, 64), (0, 21, 42, 64), (0, 1, 2, 64)])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_dropout_does_not_depend_on_the_number_of_ranks(cuts: tuple[int, ...], recipe: dict[str, Any]) -> None:
    model = build("all", "fusion", **recipe).train()
    batch = batch_for(model, 64)

    def share(rows: slice) -> Tensor:
        with random_rows(5, rows, 64, CPU):
            return target(model, take(batch, rows))

    parts = [share(slice(a, b)) for a, b in pairwise(cuts)]
    torch.testing.assert_close(torch.cat(parts), share(slice(0, 64)), rtol=1e-5, atol=1e-5)
    with random_rows(6, slice(0, 64), 64, CPU):
        assert (target(model, batch) - share(slice(0, 64))).abs().max() > 1e-3


def test_dropout_keeps_the_mean() -> None:
    torch.manual_seed(0)
    dropped = RowDropout(0.25)(torch.ones(1000, 100))
    assert abs(dropped.mean().item() - 1) < 0.02
    assert abs((dropped == 0).float().mean().item() - 0.25) < 0.02


@pytest.mark.parametrize(
    ("build_network", "config", "expected"),
    [
        (build_pair, PairConfig(recipe="published"), 7.7e6),
        (build_all, AllConfig(recipe="published"), 13.5e6),
    ],
    ids=["qwen_clip", "all_embeddings"],
)
def test_parameter_counts_with_the_published_dims(
    build_network: Callable[..., nn.Module], config: PairConfig | AllConfig, expected: float
) -> None:
    network = build_network(config, {role: PUBLISHED_DIMS[role] for role in config.bindings()})
    count = sum(parameter.numel() for parameter in network.parameters())
    assert abs(count / expected - 1) < 0.05


def test_the_base_model_takes_any_roles() -> None:
    network = ConcatNetwork({"a": 3, "b": 4}, 8, (6,), 0.1)
    there = torch.ones(5, dtype=torch.bool)
    assert network({"a": torch.randn(5, 3), "b": torch.randn(5, 4)}, {"a": there, "b": there}).shape == (5,)
