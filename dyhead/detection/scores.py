"""How class and quality, and what a second stage says of the class, become one score at test time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dyhead.options import inherited, one_of, option


@dataclass(frozen=True)
class Score:
    """From logits to the numbers that detections are selected by, ranked by, and reported with."""

    score: str = option(
        "class",
        '"class": its probability. "product": times the probability of the quality. "root": the root of the product',
        one_of("class", "product", "root"),
    )
    score_thresh_on: str = option(
        "score",
        "what SCORE_THRESH_TEST is compared with: the score, or the class's probability",
        one_of("score", "class"),
    )
    topk_by: str = option("score", "what TOPK_CANDIDATES_TEST ranks by: the same two", one_of("score", "class"))

    def __call__(
        self, logits: Tensor, quality: Tensor | None, refined: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Three times (R, K), from logits (R, K) and quality logits (R,): threshold on, rank by, report.

        ``refined``, logits (R, K) of a second stage, counts in :class:`RefinedScore` alone.

        Raises:
            ValueError: a score that needs a quality which is not predicted.
        """
        probability = logits.sigmoid()
        score = probability
        if self.score != "class":
            if quality is None:
                raise ValueError(f"SCORE {self.score}: the detector predicts no quality")
            score = probability * quality.sigmoid()[:, None]
            if self.score == "root":
                score = torch.sqrt(score)
        chosen = {"class": probability, "score": score}
        return chosen[self.score_thresh_on], chosen[self.topk_by], score


@dataclass(frozen=True)
class RefinedScore(Score):
    """The same of a detector's first stage, and the class's probability by the second one."""

    score: str = inherited(Score, "score", "root")
    score_thresh_on: str = option(
        "score",
        "what SCORE_THRESH_TEST is compared with: the first stage's score, its class's probability, or the final score",
        one_of("score", "class", "final"),
    )
    topk_by: str = option(
        "final", "what TOPK_CANDIDATES_TEST ranks by: the same three", one_of("score", "class", "final")
    )
    final_score: str = option(
        "root",
        "from the first stage's score and the second one's probability of the class: the root of their product, or the "
        "product",
        one_of("root", "product"),
    )

    def __call__(
        self, logits: Tensor, quality: Tensor | None, refined: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See :meth:`Score.__call__`."""
        probability, score = logits.sigmoid(), Score(self.score)(logits, quality)[2]
        final = score * refined.sigmoid()
        if self.final_score == "root":
            final = torch.sqrt(final)
        chosen = {"class": probability, "score": score, "final": final}
        return chosen[self.score_thresh_on], chosen[self.topk_by], final
