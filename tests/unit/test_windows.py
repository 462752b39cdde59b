"""Rows of tokens: nothing is lost but a remainder, and padding has no loss."""

from __future__ import annotations

import pytest

from common.errors import DataError
from common.text.windows import IGNORED, pack, per_document

EOS = 1


def test_pack_joins_documents_with_an_end_after_each() -> None:
    rows = pack([[10, 11, 12], [20], [30, 31]], length=3, eos=EOS)
    assert rows.input_ids.tolist() == [[10, 11, 12], [1, 20, 1], [30, 31, 1]]
    assert rows.labels.equal(rows.input_ids)
    assert len(rows) == 3


def test_pack_drops_a_remainder_behind_full_rows() -> None:
    assert pack([[10, 11], [20]], length=4, eos=EOS).input_ids.tolist() == [[10, 11, 1, 20]]


def test_pack_pads_a_remainder_that_is_all_there_is() -> None:
    rows = pack([[10, 11]], length=5, eos=EOS)
    assert rows.input_ids.tolist() == [[10, 11, 1, 1, 1]]
    assert rows.labels.tolist() == [[10, 11, 1, IGNORED, IGNORED]]


def test_packed_labels_are_a_tensor_of_their_own() -> None:
    rows = pack([[10, 11, 12]], length=2, eos=EOS)
    rows.labels[0, 0] = IGNORED
    assert rows.input_ids.tolist() == [[10, 11], [12, 1]]


def test_per_document_never_mixes_documents() -> None:
    rows = per_document([[10, 11, 12, 13], [], [20]], length=3, eos=EOS)
    assert rows.input_ids.tolist() == [[10, 11, 12], [13, 1, 1], [20, 1, 1]]
    assert rows.labels.tolist() == [[10, 11, 12], [13, 1, IGNORED], [20, 1, IGNORED]]


def test_per_document_leaves_out_a_window_that_predicts_nothing() -> None:
    assert per_document([[10, 11]], length=2, eos=EOS).input_ids.tolist() == [[10, 11]]


@pytest.mark.parametrize("cut", [pack, per_document])
@pytest.mark.parametrize("token_ids", [[], [[]], [[], []]])
def test_documents_without_tokens_are_refused(cut, token_ids) -> None:
    with pytest.raises(DataError, match="no token to train on"):
        cut(token_ids, 4, EOS)
