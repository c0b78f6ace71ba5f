"""Prompts become ids of one length, with a mask over what is padding."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from litapp.errors import LitappError
from litapp.text import PromptTokenizer


@pytest.fixture
def tokenizer(built_bundle: Path) -> Path:
    return built_bundle / "tokenizer/tokenizer.json"


def test_prompts_are_padded_to_the_longest_and_masked(tokenizer: Path) -> None:
    ids, mask = PromptTokenizer(tokenizer, 12)(["a red apple", ""])
    assert ids.tolist() == [[2, 4, 5, 8, 3], [2, 3, 0, 0, 0]]
    assert mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert ids.dtype == mask.dtype == "int64"


def test_a_prompt_that_is_cut_keeps_its_end_mark_and_is_noted(
    tokenizer: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        PromptTokenizer(tokenizer, 5)(["a red apple", "two cat"])
        assert caplog.text == ""
        ids, _ = PromptTokenizer(tokenizer, 4)(["two cat", "a red apple"])
    assert ids.tolist() == [[2, 11, 9, 3], [2, 4, 5, 3]]
    assert "cut to the 4 tokens" in caplog.text


@pytest.mark.parametrize("content", ["", "{}", "no json"])
def test_a_damaged_tokenizer_is_told(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(LitappError, match=r"tokenizer\.json is damaged"):
        PromptTokenizer(path, 12)(["a cat"])
