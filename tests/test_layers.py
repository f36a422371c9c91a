from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from fusion.all_embeddings.config import Config as AllConfig
from fusion.all_embeddings.model import build_network as build_all
from fusion.layers import Attention, Branch, ConcatNetwork, RowDropout, random_rows
from fusion.price_model import PriceModel
from fusion.qwen_clip.config import Config as PairConfig
from fusion.qwen_clip.model import build_network as build_pair

CPU = torch.device("cpu")
Batch = tuple[dict[str, Tensor], dict[str, Tensor]]
PUBLISHED = {"clip_image": 768, "siglip_image": 1152, "siglip_text": 1024, "qwen_text": 1027}


def build(variant: str, model: str, **settings: object) -> PriceModel:
    dims = {role: 9 + i for i, role in enumerate(PUBLISHED)}
    config_class, build_network = (AllConfig, build_all) if variant == "all" else (PairConfig, build_pair)
    config = config_class(**{"model": model, "width": 16, "n_heads": 2, "hidden": (12, 8), **settings})  # type: ignore[arg-type]
    dims = {role: dims[role] for role in config.bindings()}
    torch.manual_seed(0)
    return PriceModel(build_network(config, dims), dims, config.modality_dropout)  # type: ignore[arg-type]


def batch_for(model: PriceModel, n: int = 32, missing: float = 0.3) -> Batch:
    generator = torch.Generator().manual_seed(1)
    inputs = {role: torch.randn(n, dim, generator=generator) for role, dim in model.dims.items()}
    present = {role: torch.rand(n, generator=generator) >= missing for role in model.dims}
    return inputs, present


def take(batch: Batch, rows: slice) -> Batch:
    return {k: v[rows] for k, v in batch[0].items()}, {k: v[rows] for k, v in batch[1].items()}


@pytest.fixture(params=[("all", "fusion"), ("all", "concat"), ("pair", "fusion"), ("pair", "concat")], ids="-".join)
def model(request: pytest.FixtureRequest) -> PriceModel:
    return build(*request.param)


def test_a_prediction_does_not_depend_on_the_other_rows(model: PriceModel) -> None:
    model.eval()
    batch = batch_for(model)
    together = model(*batch)
    alone = torch.cat([model(*take(batch, slice(i, i + 1))) for i in range(32)])
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-6)
    assert together.std() > 1e-4


def test_every_parameter_gets_a_gradient(model: PriceModel) -> None:
    model.train()
    (model(*batch_for(model)) - 1).square().mean().backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not (p.grad != 0).any()]
    assert dead == []


@pytest.mark.parametrize("n_rows", [1, 2])
def test_gradients_have_the_strides_of_their_parameters(n_rows: int, model: PriceModel) -> None:
    """DDP warns of others, on every rank, and copies them."""
    model.train()(*batch_for(model, n_rows)).square().mean().backward()
    gradients = [(name, p.stride(), p.grad.stride()) for name, p in model.named_parameters() if p.grad is not None]
    assert [each for each in gradients if each[1] != each[2]] == []


@pytest.mark.parametrize("variant", ["all", "pair"])
def test_every_query_gets_a_gradient_above_rounding(variant: str) -> None:
    model = build(variant, "fusion").eval()
    model(*batch_for(model)).square().mean().backward()
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
    model = build(variant, "fusion").eval()
    gate = model.explained(*batch_for(model, 256))[1]["gate"]
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


def test_a_missing_source_is_replaced_by_what_was_learned(model: PriceModel) -> None:
    model.eval()
    inputs, present = batch_for(model, missing=0.0)
    role = next(iter(inputs))
    absent = present | {role: torch.zeros(32, dtype=torch.bool)}
    noise = inputs | {role: torch.full_like(inputs[role], float("nan"))}
    assert (model(inputs, absent) - model(inputs, present)).abs().max() > 1e-4
    torch.testing.assert_close(model(noise, absent), model(inputs, absent))


def test_a_row_without_any_embedding_gets_the_training_median(model: PriceModel) -> None:
    targets = torch.log1p(torch.tensor([5.0, 20.0, 400.0]))
    model.calibrate({}, targets)
    inputs, present = batch_for(model)
    nothing = {role: torch.zeros(32, dtype=torch.bool) for role in present}
    torch.testing.assert_close(model.eval().price(inputs, nothing), torch.full((32,), 20.0).double())


def test_the_output_starts_at_the_training_median(model: PriceModel) -> None:
    targets = torch.log1p(torch.tensor([5.0, 20.0, 400.0]))
    model.calibrate({}, targets)
    start = model.eval()(*batch_for(model))
    assert (start - targets.median()).abs().median() < 2 * targets.std()


def test_constant_columns_do_no_harm() -> None:
    model = build("all", "fusion").eval()
    role, dim = "clip_image", model.dims["clip_image"]
    rows = torch.randn(100, dim)
    rows[:, 0], rows[:, 1] = 3.0, 3.0 + 1e-9 * torch.randn(100)
    model.calibrate({role: (rows.mean(0), rows.std(0))}, torch.randn(100))
    inputs, present = batch_for(model, missing=0.0)
    inputs[role] = rows[:32].clone()
    before = model(inputs, present)
    inputs[role][:, :2] += 0.5  # a test row may have what no training row had
    torch.testing.assert_close(model(inputs, present), before)
    inputs[role][:, 2] += 0.5
    assert (model(inputs, present) - before).abs().max() > 1e-5


@pytest.mark.parametrize(("value", "noise"), [(0.0, 1e-9), (3.0, 1e-6)], ids=["std 1e-9", "rounding of 3"])
def test_near_constant_columns_do_no_harm(value: float, noise: float) -> None:
    model = build("all", "fusion").eval()
    role, dim = "clip_image", model.dims["clip_image"]
    rows = torch.randn(100, dim)
    rows[:, 0] = value + noise * torch.randn(100)
    assert rows[:, 0].std() > 0
    model.calibrate({role: (rows.mean(0), rows.std(0))}, torch.randn(100))
    inputs, present = batch_for(model, missing=0.0)
    inputs[role] = rows[:32].clone()
    before = model(inputs, present)
    inputs[role][:, 0] += 0.5
    torch.testing.assert_close(model(inputs, present), before)


def test_modality_dropout_never_hides_all_there_is() -> None:
    model = build("all", "concat", modality_dropout=0.4, dropout=0.0)
    seen = []
    model.network.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[1]))
    batch = batch_for(model, 500, missing=0.5)
    model.train()(*batch)
    before, after = (torch.stack(list(present.values())) for present in (batch[1], seen[0]))
    assert torch.equal(before.any(0), after.any(0))
    assert not (after & ~before).any()
    assert after.sum() < 0.85 * before.sum()


@pytest.mark.parametrize("cuts", [(0, 64), (0, 21, 42, 64), (0, 1, 2, 64)])
def test_dropout_belongs_to_the_row_whatever_the_ranks(cuts: tuple[int, ...]) -> None:
    model = build("all", "fusion").train()
    batch = batch_for(model, 64)

    def share(rows: slice) -> Tensor:
        with random_rows(5, rows, 64, CPU):
            return model(*take(batch, rows))

    parts = [share(slice(a, b)) for a, b in pairwise(cuts)]
    torch.testing.assert_close(torch.cat(parts), share(slice(0, 64)), rtol=1e-5, atol=1e-5)
    with random_rows(6, slice(0, 64), 64, CPU):
        assert (model(*batch) - share(slice(0, 64))).abs().max() > 1e-3


def test_dropout_keeps_the_mean() -> None:
    torch.manual_seed(0)
    dropped = RowDropout(0.25)(torch.ones(1000, 100))
    assert abs(dropped.mean().item() - 1) < 0.02
    assert abs((dropped == 0).float().mean().item() - 0.25) < 0.02


@pytest.mark.parametrize(
    ("build_network", "config", "expected"),
    [(build_pair, PairConfig(), 7.7e6), (build_all, AllConfig(), 13.5e6)],
    ids=["qwen_clip", "all_embeddings"],
)
def test_parameter_counts_with_the_published_dims(
    build_network: Callable[..., nn.Module], config: PairConfig | AllConfig, expected: float
) -> None:
    network = build_network(config, {role: PUBLISHED[role] for role in config.bindings()})
    count = sum(parameter.numel() for parameter in network.parameters())
    assert abs(count / expected - 1) < 0.05


def test_the_base_model_takes_any_roles() -> None:
    network = ConcatNetwork({"a": 3, "b": 4}, 8, (6,), 0.1)
    there = torch.ones(5, dtype=torch.bool)
    assert network({"a": torch.randn(5, 3), "b": torch.randn(5, 4)}, {"a": there, "b": there}).shape == (5,)
