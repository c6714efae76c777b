"""Predictions that changed, shown so that a person can judge them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_verdict import measured

from attar.audit.examples import (
    CONTEXT_TOKENS,
    MOST_SHOWN,
    TEXT_TOKENS,
    changed_predictions,
    token_divergence,
)

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def spell(tokens):
    return "".join(LETTERS[t % 26] for t in tokens)


def test_changed_predictions_come_worst_first_and_unchanged_ones_not_at_all():
    found = measured([0.1, 0.9, 0.5, 3.0, 0.2], flips=0.6)
    shown = changed_predictions(found, lambda n: f"class {n}", ["coffee", "cat", "moon"], None)
    assert [c.shown for c in shown] == ["cat", "moon", "coffee"]
    assert [c.divergence for c in shown] == [0.9, 0.5, 0.1]
    assert shown[0].before == "class 0 (100%)" and shown[0].after == "class 1 (100%)"
    assert shown[0].sample == "sample 1"


def test_no_more_are_shown_than_a_page_holds():
    found = measured(np.linspace(1, 2, 100), flips=1.0)
    shown = changed_predictions(found, str, [], None)
    assert len(shown) == MOST_SHOWN
    assert shown[0].divergence == 2.0 and shown[0].shown == ""


def test_text_is_shown_up_to_the_prediction():
    found = replace(
        measured([0.1, 0.9], flips=1.0), sample=np.array([0, 1]), position=np.array([2, 40])
    )
    texts = [torch.arange(50), torch.arange(50) + 1]
    long, short = changed_predictions(found, lambda n: spell([n]), texts, spell)
    assert short.shown == "abc" and short.sample == "sample 0, token 2"
    assert long.shown == spell(range(41 + 1 - CONTEXT_TOKENS, 42))
    assert len(long.shown) == CONTEXT_TOKENS


def test_nothing_changed_is_nothing_shown():
    assert changed_predictions(measured([0.1, 0.2]), str, [], None) == []


def test_a_token_carries_what_predicting_it_lost():
    found = replace(
        measured([0.1, 0.2, 0.3, 9.0]),
        sample=np.array([0, 0, 0, 1]),
        position=np.array([0, 1, 2, 0]),
    )
    shown = token_divergence(found, [torch.tensor([7, 8, 9])], lambda t: spell([t]))
    assert [word for word, _ in shown] == ["h", "i", "j"]
    assert [nats for _, nats in shown] == pytest.approx([0.0, 0.1, 0.2])


def test_a_long_text_is_cut_and_no_text_is_no_tokens():
    found = measured([0.1])
    assert len(token_divergence(found, [torch.arange(500)], str)) == TEXT_TOKENS
    assert token_divergence(found, [], str) == []
