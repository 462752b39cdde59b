"""The flat adapter: what is packed can be seen again, and a layout from anyone is read with care."""

from __future__ import annotations

import json
import string

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from common.adapter import Adapter, Layout, outer_views, tensor_bytes
from common.errors import ConfigurationError
from common.lowrank import Dense, LowRank, Update

NAMES = st.text(string.ascii_letters + ".é\u0000\n", min_size=1, max_size=6)
SIZES = st.integers(1, 5)
DTYPES = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])
Content = tuple[dict[str, Update], dict[str, Tensor], torch.dtype]


@st.composite
def contents(draw: st.DrawFn) -> Content:
    """Layers of both kinds, heads of any shape, one dtype."""
    dtype = draw(DTYPES)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    layers: dict[str, Update] = {}
    for name in draw(st.lists(NAMES, unique=True, max_size=5)):
        out, inn, rank = draw(SIZES), draw(SIZES), draw(st.integers(-1, 6))
        layers[name] = Dense(normal(out, inn)) if rank < 0 else LowRank(normal(out, rank), normal(rank, inn))
    heads = {
        name: normal(*draw(st.lists(SIZES, max_size=3))) for name in draw(st.lists(NAMES, unique=True, max_size=3))
    }
    return layers, heads, dtype


@given(contents())
def test_what_is_packed_is_seen_again(content: Content) -> None:
    layers, heads, dtype = content
    adapter = Adapter.pack(layers, heads, "dora")
    assert (list(adapter.layers), list(adapter.extras)) == (sorted(layers), sorted(heads))
    assert adapter.method == "dora"
    for name, update in layers.items():
        seen = adapter.layers[name]
        if isinstance(update, Dense):
            assert isinstance(seen, Dense)
            assert torch.equal(seen.w, update.w)
        else:
            assert isinstance(seen, LowRank)
            assert torch.equal(seen.b, update.b)
            assert torch.equal(seen.a, update.a)
    for name, value in heads.items():
        assert torch.equal(adapter.extras[name], value)
        assert adapter.extras[name].shape == value.shape
    if adapter.flat.numel():
        assert adapter.flat.dtype == dtype
    assert adapter.nbytes == len(tensor_bytes(adapter.flat))


@given(contents())
def test_layers_are_views_and_the_frozen_factors_come_last(content: Content) -> None:
    layers, heads, _ = content
    adapter = Adapter.pack(layers, heads)
    marked = Adapter(torch.zeros_like(adapter.flat), adapter.layout)
    marked.inner_factors.fill_(1)
    for seen in marked.layers.values():
        if isinstance(seen, LowRank):
            assert bool((seen.a == 1).all())
            assert not seen.b.any()
        else:
            assert not seen.w.any()
    assert not any(value.any() for value in marked.extras.values())
    outer, extras = outer_views(adapter.flat[: adapter.layout.head_numel], adapter.layout)
    assert all(
        torch.equal(outer[name], seen.b if isinstance(seen, LowRank) else seen.w)
        for name, seen in adapter.layers.items()
    )
    assert extras.keys() == adapter.extras.keys()


@given(contents())
def test_a_layout_survives_json(content: Content) -> None:
    layers, heads, _ = content
    layout = Adapter.pack(layers, heads, "lora").layout
    again = Layout.from_json(layout.to_json())
    assert again == layout
    assert hash(again) == hash(layout)
    assert (again.numel, again.head_numel) == (layout.numel, layout.head_numel)


@given(contents())
def test_the_hash_sees_every_change(content: Content) -> None:
    layers, heads, dtype = content
    adapter = Adapter.pack(layers, heads)
    assert adapter.sha256() == Adapter.pack(layers, heads).sha256()
    assert adapter.sha256() != Adapter.pack(layers, heads, "dora").sha256()
    if adapter.flat.numel():
        other = adapter.flat.clone()
        other[-1] += 1
        assert adapter.sha256() != adapter.with_flat(other).sha256()
    if adapter.flat.numel() and dtype in (torch.float16, torch.bfloat16):
        twin = torch.bfloat16 if dtype == torch.float16 else torch.float16
        assert adapter.sha256() != adapter.with_flat(adapter.flat.view(twin)).sha256()


@given(contents(), st.integers(0, 6))
def test_narrowing_keeps_the_first_slots(content: Content, rank: int) -> None:
    layers, heads, _ = content
    adapter = Adapter.pack(layers, heads)
    narrow = adapter.narrowed(rank)
    for name, update in layers.items():
        seen = narrow.layers[name]
        if isinstance(update, LowRank):
            assert isinstance(seen, LowRank)
            assert torch.equal(seen.b, update.b[:, :rank])
            assert torch.equal(seen.a, update.a[:rank])
        else:
            assert isinstance(seen, Dense)
            assert torch.equal(seen.w, update.w)
    assert all(torch.equal(narrow.extras[name], value) for name, value in heads.items())
    assert adapter.narrowed(99) is adapter


def test_packing_copies() -> None:
    b, a = torch.ones(2, 1, requires_grad=True), torch.ones(1, 2)
    adapter = Adapter.pack({"x": LowRank(b, a)})
    a.zero_()
    assert bool((adapter.flat == 1).all())
    assert not adapter.flat.requires_grad


def test_nothing_packs_to_nothing() -> None:
    empty = Adapter.empty("lora")
    assert (empty.layers, empty.extras, empty.nbytes) == ({}, {}, 0)
    assert empty.sha256() == Adapter.pack({}).sha256()


def test_a_buffer_must_fit_its_layout() -> None:
    layout = Layout((("x", 2, 3, 1),))
    with pytest.raises(ConfigurationError, match="does not fit its layout of 5 numbers"):
        Adapter(torch.zeros(6), layout)
    with pytest.raises(ConfigurationError, match="does not fit"):
        Adapter(torch.zeros(5, 1), layout)


def entry(**changes: object) -> str:
    return json.dumps({"layers": [["x", 2, 3, 1]], "extras": [["h", [2]]], "method": "lora", **changes})


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="empty"),
        pytest.param("[]", id="list"),
        pytest.param("null", id="null"),
        pytest.param("{}", id="no keys"),
        pytest.param("[" * 100_000, id="deep"),
        pytest.param('{"layers": [[' + "9" * 5000 + "]]}", id="huge literal"),
        pytest.param(entry(layers=[["x", 2, 3]]), id="short layer"),
        pytest.param(entry(layers=[["x", -2, 3, 1]]), id="negative size"),
        pytest.param(entry(layers=[["x", 2, 3, -2]]), id="negative rank"),
        pytest.param(entry(layers=[["x", 2.0, 3, 1]]), id="float size"),
        pytest.param(entry(layers=[["x", True, 3, 1]]), id="boolean size"),
        pytest.param(entry(layers=[["x", "2", 3, 1]]), id="text size"),
        pytest.param(entry(layers=[["x", 2**64, 3, 1]]), id="size beyond any machine"),
        pytest.param(entry(layers=[[None, 2, 3, 1]]), id="no name"),
        pytest.param(entry(layers=[[["x"], 2, 3, 1]]), id="list name"),
        pytest.param(entry(layers=[["\ud800", 2, 3, 1]]), id="name that is no text"),
        pytest.param(entry(layers=[["x", 2, 3, 1], ["x", 2, 3, 1]]), id="twice"),
        pytest.param(entry(layers=[["y", 2, 3, 1], ["x", 2, 3, 1]]), id="not sorted"),
        pytest.param(entry(layers={"x": 1}), id="layers object"),
        pytest.param(entry(layers=5), id="layers number"),
        pytest.param(entry(extras=[["h", 2]]), id="shape number"),
        pytest.param(entry(extras=[["h", "22"]]), id="shape text"),
        pytest.param(entry(extras=[["h", [2]], ["h", [2]]]), id="head twice"),
        pytest.param(entry(method=None), id="no method"),
    ],
)
def test_a_hostile_layout_is_refused_in_one_short_line(text: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Layout.from_json(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


def test_a_good_layout_is_not_refused() -> None:
    assert Layout.from_json(entry()).numel == 2 + 2 + 3
