"""Verb and noun as one action, by the two rules in use for EPIC-KITCHENS.

- *The official one* (EPIC-KITCHENS-100's scorer): an action's score is the product of its verb's and its noun's
  softmax; a clip is right at k when its pair is among the k best pairs.
- *Both*: a clip is right at k when its verb is among the k best verbs and its noun among the k best nouns.

At k = 1 they are the same. The scorer forms pairs of the 100 best verbs and nouns alone, which changes no rank
below 100. A classifier on verb and noun has one more "head" here, `action`; it is scored, never trained.
"""

from collections.abc import Collection

import numpy as np
import numpy.typing as npt

from mmkd.cache_tools.cache.softmax import log_softmax
from mmkd.cache_tools.frames.records import Float64Array, IntArray
from mmkd.student.evaluation.metrics import ClipScores

VERB, NOUN, ACTION = "verb", "noun", "action"
BLOCK_CLIPS = 128
"""Clips whose pairs are formed together: 97 verbs and 300 nouns take 30 MB."""


def has_actions(heads: Collection[str]) -> bool:
    """Return whether heads are verb and noun, whose pairs are actions."""
    return set(heads) == {VERB, NOUN}


def action_scores(
    verb_logits: npt.NDArray[np.floating],
    noun_logits: npt.NDArray[np.floating],
    verb_labels: IntArray,
    noun_labels: IntArray,
) -> ClipScores:
    """Return how clips fared on actions, by the official rule; confidence and cross-entropy are the pair's.

    Logits (N, verbs) and (N, nouns), labels (N,) each within them. Of pairs with equal scores the one of the lower
    verb, then noun, comes first.
    """
    log_verb, log_noun = log_softmax(verb_logits.astype(np.float64)), log_softmax(noun_logits.astype(np.float64))
    blocks = [slice(start, start + BLOCK_CLIPS) for start in range(0, len(log_verb), BLOCK_CLIPS)]
    ranks = [_ranks(log_verb[b], log_noun[b], verb_labels[b], noun_labels[b]) for b in blocks]
    rows = np.arange(len(log_verb))
    nll = -(log_verb[rows, verb_labels] + log_noun[rows, noun_labels])
    confidence = np.exp(log_verb.max(1, initial=-np.inf) + log_noun.max(1, initial=-np.inf))
    return ClipScores(np.concatenate([np.zeros(0, np.int64), *ranks]), confidence, nll)


def _ranks(log_verb: Float64Array, log_noun: Float64Array, verbs: IntArray, nouns: IntArray) -> IntArray:
    """Return (n,) how many pairs come before each clip's own."""
    rows = np.arange(len(log_verb))
    pairs = (log_verb[:, :, None] + log_noun[:, None, :]).reshape(len(rows), -1)
    own_pair = verbs * log_noun.shape[1] + nouns
    own = pairs[rows, own_pair][:, None]
    earlier = np.arange(pairs.shape[1]) < own_pair[:, None]
    ranks: IntArray = ((pairs > own) | ((pairs == own) & earlier)).sum(1)
    return ranks
