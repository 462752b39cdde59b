"""PEFT folders merged into one that stock PEFT loads, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common.adapter import Adapter
from common.errors import ConfigurationError, DataError, LoRAFleetError, StoreError, UserError
from common.lowrank import Dense, Update
from common.peft_folder import CONFIG, WEIGHTS, read_adapter
from server.merge import Merge, merge_folders
from strategies.oneshot import ONESHOT
from tests.reference import cohorts, dense
from tests.unit.test_peft_folder import classifier, gpt2, llama, made_by_peft, outputs, picture, with_adapter

MIXED: list[dict[str, Any]] = [
    {"r": 4, "lora_alpha": 6},
    {"r": 6, "lora_alpha": 5, "use_rslora": True},
    {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 11}, "use_rslora": True},
]
"""Ranks, alphas and scalings of all kinds; rsLoRA first or not must not matter."""


def folder(place: Path, seed: int, build: Callable[[], nn.Module] = llama, **options: Any) -> Path:
    """Let PEFT write an adapter whose numbers are the seed's own."""
    made_by_peft(place, build, **options)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: 0.2 * torch.randn(value.shape, generator=generator) for name, value in load_file(place / WEIGHTS).items()
    }
    save_file(tensors, place / WEIGHTS, {"format": "pt"})
    return place


def three(place: Path, order: Sequence[int] = (0, 1, 2)) -> list[Path]:
    return [folder(place / str(number), number, **MIXED[number]) for number in order]


def average(places: Sequence[Path], weights: Sequence[float]) -> Adapter:
    """Return ``Σ w ΔW``, and the mean of the heads, by plain sums of matrices."""
    layers: dict[str, Update] = {}
    adapters = [read_adapter(place) for place in places]
    for name in adapters[0].layers:
        total = sum(w * a.layers[name].dense().double() for w, a in zip(weights, adapters, strict=True))
        assert isinstance(total, Tensor)
        layers[name] = Dense(total.float())
    heads = {}
    for name in adapters[0].extras:
        mean = sum(w / sum(weights) * a.extras[name] for w, a in zip(weights, adapters, strict=True))
        assert isinstance(mean, Tensor)
        heads[name] = mean
    return Adapter.pack(layers, heads)


def loaded(build: Callable[[], nn.Module], place: Path) -> Tensor:
    return outputs(PeftModel.from_pretrained(build(), place))


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0)])
@pytest.mark.parametrize("weights", [[], [0.5, 1.5, 1.0]])
def test_stock_peft_gives_the_outputs_of_the_exact_sum(
    tmp_path: Path, order: Sequence[int], weights: list[float]
) -> None:
    places = three(tmp_path, order)
    made = merge_folders(places, tmp_path / "out", weights=weights)
    wanted = outputs(with_adapter(llama, average(places, weights or [1 / 3] * 3)))
    torch.testing.assert_close(loaded(llama, tmp_path / "out"), wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(wanted, outputs(llama()), atol=1e-2)
    assert made.error == 0.0
    assert made.weights == (weights or [1 / 3] * 3)
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert (config["use_rslora"], config["task_type"]) == (False, None)


@pytest.mark.parametrize("name", ONESHOT.names())
def test_what_is_reported_is_what_was_written(tmp_path: Path, name: str) -> None:
    """Norms, errors and effective ranks against dense matrices of the folder on disk."""
    options = {"rank": 3} if "rank" in ONESHOT.plugin(name).model_fields else {}
    places = [folder(tmp_path / str(number), number, r=4, use_rslora=number > 0) for number in range(3)]
    weights = [0.5, 1.5, 1.0]
    made = merge_folders(places, tmp_path / "out", name, options, weights)
    written, exact = read_adapter(tmp_path / "out"), average(places, weights)
    assert [row.layer for row in made.layers] == list(exact.layers)
    apart = whole = norm = 0.0
    for row in made.layers:
        found, wanted = (cohorts.numpy(a.layers[row.layer].dense()) for a in (written, exact))
        assert row.error == pytest.approx(dense.distance(found, wanted), rel=1e-3, abs=1e-6)
        assert row.norm == pytest.approx(math.sqrt(float((found**2).sum())), rel=1e-5)
        assert row.effective_rank == dense.energy_rank(found, 0.95)
        assert row.rank == (3 if options else 4 if name == "average" else 12)
        apart, whole = apart + float(((found - wanted) ** 2).sum()), whole + float((wanted**2).sum())
        norm += float((found**2).sum())
    assert made.error == pytest.approx(math.sqrt(apart / whole), rel=1e-3, abs=1e-6)
    assert made.norm == pytest.approx(math.sqrt(norm), rel=1e-5)
    assert (made.strategy, made.options.get("rank")) == (name, 3 if options else None)
    torch.testing.assert_close(
        loaded(llama, tmp_path / "out"), outputs(with_adapter(llama, written)), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (gpt2, {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
        (picture, {"target_modules": ["conv", "fc", "top.fc"]}),
        (classifier, {"modules_to_save": ["score"], "task_type": "SEQ_CLS"}),
    ],
    ids=["conv1d", "convolution", "heads"],
)
def test_all_kinds_of_layers_are_merged(
    tmp_path: Path, build: Callable[[], nn.Module], options: dict[str, Any]
) -> None:
    places = [folder(tmp_path / str(rank), rank, build, r=rank, **options) for rank in (2, 4)]
    merge_folders(places, tmp_path / "out")
    wanted = with_adapter(build, average(places, [0.5, 0.5]))
    found = PeftModel.from_pretrained(build(), tmp_path / "out")
    torch.testing.assert_close(outputs(found.base_model), outputs(wanted), rtol=1e-4, atol=1e-4)


def test_peft_and_we_agree_on_svd_and_ties(tmp_path: Path) -> None:
    """Where PEFT has no scale bug: plain alpha / r. Its ``cat`` with rsLoRA first is wrong by √R."""
    places = [folder(tmp_path / str(number), number, r=4) for number in range(2)]
    model = PeftModel.from_pretrained(llama(), places[0], "one")
    model.load_adapter(str(places[1]), "two")
    tuner: Any = model.base_model
    tuner.add_weighted_adapter(["one", "two"], [0.5, 0.5], "svd", "svd", svd_rank=3)
    tuner.add_weighted_adapter(["one", "two"], [1.0, 1.0], "ties", "ties_svd", svd_rank=3, density=0.4)
    tuner.add_weighted_adapter(["one", "two"], [0.5, 0.5], "stack", "cat")
    for name, options in (("svd", {"rank": 3}), ("ties", {"rank": 3, "density": 0.4}), ("stack", {})):
        merge_folders(places, tmp_path / name, name, options)
        model.set_adapter(name)
        torch.testing.assert_close(loaded(llama, tmp_path / name), outputs(model), rtol=1e-3, atol=1e-4)


def test_one_adapter_can_be_cut_and_merges_can_be_merged(tmp_path: Path) -> None:
    places = three(tmp_path)
    cut = merge_folders(places[:1], tmp_path / "cut", "svd", {"rank": 2})
    assert {row.rank for row in cut.layers} == {2}
    merge_folders([tmp_path / "cut", places[1]], tmp_path / "again")
    wanted = average([tmp_path / "cut", places[1]], [0.5, 0.5])
    torch.testing.assert_close(
        loaded(llama, tmp_path / "again"), outputs(with_adapter(llama, wanted)), rtol=1e-4, atol=1e-4
    )


def test_the_same_seed_writes_the_same_bytes(tmp_path: Path) -> None:
    places = three(tmp_path)
    for out, seed in (("one", 4), ("two", 4), ("three", 5)):
        merge_folders(places, tmp_path / out, "dare", seed=seed)
    one, two, other = ((tmp_path / out / WEIGHTS).read_bytes() for out in ("one", "two", "three"))
    assert one == two != other


# ---- bad input


def refused(kind: type[LoRAFleetError], said: str | list[str], *args: Any, **options: Any) -> None:
    with pytest.raises(kind) as caught:
        merge_folders(*args, **options)
    for part in [said] if isinstance(said, str) else said:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def edit(place: Path, **changes: Any) -> Path:
    config = json.loads((place / CONFIG).read_text())
    (place / CONFIG).write_text(json.dumps(config | changes))
    return place


def test_all_differences_are_listed(tmp_path: Path) -> None:
    one = edit(folder(tmp_path / "one", 1), base_model_name_or_path="some/base")
    two = folder(tmp_path / "two", 2, target_modules=["q_proj", "up_proj"])
    edit(two, base_model_name_or_path="other/base", revision="v2", task_type="CAUSAL_LM")
    said = [
        f"{two}: base model 'other/base' differs from 'some/base' of {one}",
        f"{two}: revision of the base model 'v2' differs from None",
        f"{two}: task type 'CAUSAL_LM' differs from None",
        f"{two} lacks layers of {one}: model.layers.0.mlp.down_proj, model.layers.1.mlp.down_proj",
        f"{two} has layers that {one} lacks: model.layers.0.mlp.up_proj, model.layers.1.mlp.up_proj",
    ]
    refused(ConfigurationError, said, [one, two], tmp_path / "out")
    with pytest.raises(ConfigurationError) as caught:
        merge_folders([one, two], tmp_path / "out")
    assert len(caught.value.problems) == 5
    assert not (tmp_path / "out").exists()


def test_other_shapes_are_listed(tmp_path: Path) -> None:
    one, two = folder(tmp_path / "one", 1), folder(tmp_path / "two", 2)
    tensors = load_file(two / WEIGHTS)
    key = next(name for name in tensors if "1.self_attn.q_proj.lora_A" in name)
    tensors[key] = torch.ones(4, 7)
    save_file(tensors, two / WEIGHTS)
    said = f"{two}: model.layers.1.self_attn.q_proj is (16, 7), in {one} (16, 16)"
    refused(ConfigurationError, said, [one, two], tmp_path / "out")


def test_heads_of_one_adapter_alone_are_refused(tmp_path: Path) -> None:
    one = folder(tmp_path / "one", 1, classifier)
    two = folder(tmp_path / "two", 2, classifier, modules_to_save=["score"])
    refused(ConfigurationError, f"{two} has whole modules that {one} lacks: score.weight", [one, two], tmp_path / "o")
    refused(ConfigurationError, f"{one} lacks whole modules of {two}: score.weight", [two, one], tmp_path / "o")


def test_an_average_of_other_ranks_is_refused_with_the_layers(tmp_path: Path) -> None:
    one = folder(tmp_path / "one", 1)
    two = folder(tmp_path / "two", 2, rank_pattern={"q_proj": 3})
    said = f"{two}: other ranks than in {one}: model.layers.0.self_attn.q_proj, model.layers.1.self_attn.q_proj; a mean"
    refused(ConfigurationError, said, [one, two], tmp_path / "out", "average")


def test_a_base_model_is_the_same_however_its_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "base").mkdir()
    one = edit(folder(tmp_path / "one", 1), base_model_name_or_path=str(tmp_path / "base"))
    two = edit(folder(tmp_path / "two", 2), base_model_name_or_path="base")
    monkeypatch.chdir(tmp_path)
    assert isinstance(merge_folders([one, two], tmp_path / "out"), Merge)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"use_dora": True}, "holds LoRA with use_dora; only plain LoRA can be taken over"),
        ({"build": gpt2, "target_modules": ["c_attn"], "bias": "all"}, "holds trained biases (bias 'all')"),
        ({"init_lora_weights": "pissa"}, "holds factors for changed base weights"),
    ],
)
def test_anything_but_plain_lora_is_refused(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    made_by_peft(tmp_path / "odd", **options)
    refused(DataError, said, [tmp_path / "odd"], tmp_path / "out")


def test_folders_that_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    refused(DataError, "empty is no readable PEFT folder", [tmp_path / "empty"], tmp_path / "out")
    for name in ("nowhere", "file", "a\0b"):
        refused(
            DataError, "is no folder; expected a PEFT folder with adapter_config.json", [Path(name)], tmp_path / "o"
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file"]


@pytest.mark.parametrize("worth", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_refused(tmp_path: Path, worth: float) -> None:
    place = folder(tmp_path / "one", 1)
    tensors = load_file(place / WEIGHTS)
    next(iter(tensors.values()))[0, 0] = worth
    save_file(tensors, place / WEIGHTS)
    refused(DataError, f"{place} holds NaN or infinity", [place], tmp_path / "out")


def test_adapters_of_zeros_are_refused(tmp_path: Path) -> None:
    place = folder(tmp_path / "one", 1)
    save_file({name: value * 0 for name, value in load_file(place / WEIGHTS).items()}, place / WEIGHTS)
    for name in ("svd", "lora_lego", "ties"):
        refused(ConfigurationError, "the adapters add up to nothing", [place, place], tmp_path / "out", name)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"weights": [1.0]}, "1 weights for 2 adapters; give --weight once for each, or never"),
        ({"weights": [1.0, 0.0]}, "a weight is 0.0; expected a positive, finite number"),
        ({"weights": [1.0, -1.0]}, "a weight is -1.0; expected"),
        ({"weights": [1.0, math.nan]}, "a weight is nan; expected"),
        ({"weights": [1e-300, 1e-300]}, "a weight is 1e-300; expected a positive, finite number from 1e-06 to 1e+06"),
        ({"weights": [1e308, 1e308]}, "a weight is 1e+308; expected"),
        (
            {"strategy": "svd", "options": {"rank": 0}},
            "one-shot merge svd: rank: Input should be greater than or equal",
        ),
        ({"strategy": "ties", "options": {"density": 2}}, "one-shot merge ties: density: Input should be less than 1"),
        ({"options": {"rank": 4}}, "one-shot merge stack: unknown key 'rank'; known are: none"),
        (
            {"strategy": "flora"},
            "no one-shot merge named 'flora'; there is: average, dare, lora_lego, stack, svd, ties",
        ),
    ],
    ids=range(10),
)
def test_options_and_weights_are_checked_before_anything_is_read(
    tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    refused(UserError, said, [tmp_path / "nowhere"] * 2, tmp_path / "out", **options)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    place = folder(tmp_path / "one", 1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    refused(UserError, "full is not an empty folder; give another --out", [place], tmp_path / "full")
    refused(UserError, "one is not an empty folder", [place], place)
    (tmp_path / "empty").mkdir()
    merge_folders([place], tmp_path / "empty")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full", "one"]


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    place = folder(tmp_path / "one", 1)
    (tmp_path / "file").write_text("")
    refused(StoreError, "cannot be written: Not a directory", [place], tmp_path / "file" / "out")


def test_a_setting_that_is_no_number_is_told(tmp_path: Path) -> None:
    place = edit(folder(tmp_path / "one", 1), lora_alpha="much")
    refused(DataError, "has lora_alpha 'much'; expected a number", [place], tmp_path / "out")


def test_no_adapter_at_all_is_refused(tmp_path: Path) -> None:
    refused(ConfigurationError, "there is no adapter to merge; give at least one PEFT folder", [], tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rank_pattern": {"q_proj": 7}}, "has rank 7 by adapter_config.json, but its tensors are lora_A (4, 16)"),
        ({"r": 0}, "has rank 0 by adapter_config.json"),
        ({"lora_alpha": 10**400}, "; expected a number, at most 1e+06"),
        (
            {"alpha_pattern": {"(a+)+$|(.*)*x": 3}},
            "alpha_pattern has a key that is no regular expression to read safely",
        ),
        ({"base_model_name_or_path": 5}, "base_model_name_or_path is 5; expected a str or null"),
        ({"fan_in_fan_out": "no"}, "fan_in_fan_out is 'no'; expected a bool or null"),
        ({"task_type": "SINGING"}, "task_type is 'SINGING'; expected null or one of SEQ_CLS"),
    ],
    ids=range(7),
)
def test_a_configuration_that_does_not_fit_is_told(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    refused(DataError, said, [edit(folder(tmp_path / "one", 1), **changes)], tmp_path / "out")


@pytest.mark.parametrize("name", ONESHOT.names())
def test_the_smallest_and_largest_weights_are_merged_or_told_before_anything_is_written(
    tmp_path: Path, name: str
) -> None:
    places = [folder(tmp_path / str(number), number) for number in range(2)]
    for number, weights in enumerate(([1e-6, 1e-6], [1e6, 1e6], [1e-6, 1e6])):
        made = merge_folders(places, tmp_path / f"out{number}", name, weights=weights)
        assert math.isfinite(made.error)
    tensors = load_file(places[0] / WEIGHTS)
    save_file({key: value * 1e9 for key, value in tensors.items()}, places[0] / WEIGHTS)
    refused(DataError, "expected numbers up to 1e+06; train it again", places, tmp_path / "out", name)


def test_nothing_is_written_when_the_numbers_overflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = folder(tmp_path / "one", 1)
    monkeypatch.setattr("server.merge.MOST_WEIGHT", 1e39)
    refused(ConfigurationError, "svd", [place], tmp_path / "out", "svd", weights=[1e39])


def test_layers_may_have_the_names_of_what_modules_have(tmp_path: Path) -> None:
    place = folder(tmp_path / "one", 1)
    tensors = load_file(place / WEIGHTS)
    renamed = {key.replace("self_attn", "training").replace("mlp", "forward"): value for key, value in tensors.items()}
    save_file(renamed, place / WEIGHTS)
    merge_folders([place, place], tmp_path / "out")
    assert read_adapter(tmp_path / "out").layers.keys() == read_adapter(place).layers.keys()
