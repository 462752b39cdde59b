"""Checks before training under privacy: what is wrong with gradients, losses or parameters is found and named."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from client.privacy.engine import open_engine
from client.privacy.gradients.outer import Outer
from client.privacy.gradients.record import Record
from client.privacy.self_check import check_gradients, check_moved, check_trainable
from common.errors import NotPrivate

GRADIENTS = ("own", "hooks", "functorch", "ghost")


class Tagger(nn.Module):
    """Scores the tokens of a row; one factor starts at zero, as LoRA's b does, and dropout is called in both ways."""

    def __init__(self, kind: type[nn.Module] = nn.Identity) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.dropout = nn.Embedding(11, 6), nn.Dropout(0.5)
        self.a, self.b = nn.Linear(6, 3, bias=False), nn.Linear(3, 6, bias=False)
        self.between, self.head = kind(), nn.Linear(6, 5)
        nn.init.zeros_(self.b.weight)
        self.words.weight.requires_grad_(False)

    def forward(self, words: Tensor) -> Tensor:
        """Score."""
        x = self.words(words)
        return self.head(F.dropout(self.between(x + self.b(self.a(self.dropout(x)))), 0.3, self.training))


class Centred(nn.Module):
    """Takes the mean over rows away, in training only, as batch normalisation would."""

    def forward(self, x: Tensor) -> Tensor:
        """Centre."""
        return x - x.mean(dim=0, keepdim=True) if self.training else x


BATCH = {
    "words": torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]]),
    "labels": torch.tensor([[1, 2, 3, 4], [3, 1, -100, -100]]),
}


def losses_of(model: nn.Module) -> Callable[[Mapping[str, Tensor]], Tensor]:
    def losses(batch: Mapping[str, Tensor]) -> Tensor:
        tokens = F.cross_entropy(model(batch["words"]).transpose(1, 2), batch["labels"], reduction="none")
        return tokens.sum(dim=1) / (batch["labels"] >= 0).sum(dim=1)

    return losses


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("gradients", GRADIENTS)
def test_a_right_model_passes_and_is_left_bit_for_bit_as_it_was(gradients: Any) -> None:
    model = Tagger().eval()
    model.head.train()
    model.head.bias.grad = torch.ones(5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    check_gradients(model, trained(model), losses_of(model), BATCH, gradients=gradients)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert after.keys() == before.keys()
    assert model.head.bias.grad.tolist() == [1] * 5
    assert model.a.weight.grad is None
    assert (model.training, model.dropout.training, model.head.training) == (False, False, True)


def test_weights_of_half_the_bits_are_compared_coarsely() -> None:
    model = Tagger()
    model.words.bfloat16()
    losses = losses_of(model)
    model.words.register_forward_hook(lambda module, inputs, output: output.float())
    check_gradients(model, trained(model), losses, BATCH)


def test_what_an_engine_leaves_holds_no_graph() -> None:
    """A head so wide that its gradient is kept as vectors, some of them of the forward pass."""
    model, inputs = nn.Linear(200, 2000), torch.ones(2, 4, 200, requires_grad=True)
    parameters = list(model.parameters())
    with open_engine(
        model, parameters, torch.optim.SGD(parameters), noise_multiplier=0.0, clipping_norm=1.0, expected_rows=1.0,
        generator=torch.Generator(),
    ) as engine:  # fmt: skip
        engine.add(lambda: model(inputs).sum(dim=(1, 2)), 2)
        engine.add(lambda: model(inputs).sum(dim=(1, 2)), 2)
        assert [parameter.summed_grad.requires_grad for parameter in parameters] == [False, False]


def test_a_rule_that_is_off_by_a_factor_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The factor's gradient is zero as long as b is: only perturbed numbers show it."""
    add_outer, model = Record.add_outer, Tagger()

    def doubled(record: Record, parameter: Tensor, pair: Outer) -> None:
        twice = parameter is model.a.weight
        add_outer(record, parameter, Outer(pair.left * 2, pair.right, pair.shape) if twice else pair)

    monkeypatch.setattr(Record, "add_outer", doubled)
    with pytest.raises(NotPrivate, match=r"per-row gradients of a\.weight are not what autograd finds"):
        check_gradients(model, trained(model), losses_of(model), BATCH)


def test_rows_that_are_mixed_up_are_found_although_their_sum_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    model, add = Tagger(), Record.add
    mixed = lambda record, parameter, g: add(record, parameter, g.mean(dim=0, keepdim=True).expand_as(g))  # noqa: E731
    monkeypatch.setattr(Record, "add", mixed)
    monkeypatch.setattr(Record, "add_outer", lambda record, p, pair: mixed(record, p, pair.dense()))
    with pytest.raises(NotPrivate, match="not what autograd finds"):
        check_gradients(model, trained(model), losses_of(model), BATCH)


def test_clipping_each_layer_for_itself_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def by_layer(record: Record, clipping_norm: float) -> list[Tensor]:
        sums = []
        for whole, pairs in zip(record._whole, record._pairs, strict=True):
            rows = pairs[0].dense() if whole is None else whole
            factors = (clipping_norm / rows.flatten(1).norm(dim=1)).clamp(max=1)
            sums.append(torch.einsum("b,b...->...", factors, rows))
        return sums

    monkeypatch.setattr(Record, "clipped_sums", by_layer)
    model = Tagger()
    with pytest.raises(NotPrivate, match="not what autograd finds"):
        check_gradients(model, trained(model), losses_of(model), BATCH)


def over_the_batch(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    tokens = F.cross_entropy(model(batch["words"]).transpose(1, 2), batch["labels"], reduction="none")
    return tokens.sum(dim=1) / (batch["labels"] >= 0).sum() * len(tokens)


def test_a_loss_normalised_over_the_batch_is_found() -> None:
    model = Tagger()
    with pytest.raises(NotPrivate, match="a row's loss depends on the other rows"):
        check_gradients(model, trained(model), lambda batch: over_the_batch(model, batch), BATCH)


def test_one_loss_for_all_rows_is_refused() -> None:
    model = Tagger()
    with pytest.raises(NotPrivate, match=r"shape \(\) for 2 rows"):
        check_gradients(model, trained(model), lambda batch: losses_of(model)(batch).mean(), BATCH)


def test_a_layer_that_couples_rows_in_training_is_found() -> None:
    model = Tagger(Centred).eval()
    with pytest.raises(NotPrivate, match="a row's loss depends on the other rows"):
        check_gradients(model, trained(model), losses_of(model), BATCH)


def test_an_extra_parameter_that_learns_is_named() -> None:
    model = Tagger()
    intended = trained(model)
    check_trainable(model, intended)
    model.words.weight.requires_grad_(True)
    with pytest.raises(NotPrivate, match=r"words\.weight is trainable but not among"):
        check_trainable(model, intended)


def test_a_parameter_replaced_after_the_optimizer_was_built_is_found() -> None:
    model = Tagger()
    intended = trained(model)
    model.a.weight = nn.Parameter(model.a.weight.detach().clone())
    with pytest.raises(NotPrivate, match=r"a\.weight"):
        check_trainable(model, intended)
    with pytest.raises(NotPrivate, match=r"a\.weight"):
        check_moved([p.detach().clone() for p in intended], intended, model)


def test_a_parameter_that_stood_still_is_named() -> None:
    model = Tagger()
    intended = trained(model)
    before = [parameter.detach().clone() for parameter in intended]
    with torch.no_grad():
        for parameter in intended:
            parameter.add_(1e-3)
    check_moved(before, intended, model)
    model.b.weight.data.zero_()
    with pytest.raises(NotPrivate, match=r"b\.weight did not move"):
        check_moved(before, intended, model)
