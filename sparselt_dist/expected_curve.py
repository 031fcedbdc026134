"""A guard: does the training loss follow what the profile's own runs have measured, at equal shares of the budget?

A reference is a list of points (share of the budget, loss, sigma), joined by straight lines. The loss is smoothed over the
journal's lines, and the run is warned once each time that it goes out by more than three sigma, on either side: a loss
far below is as suspect as one far above. Free of torch.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from statistics import fmean

MAX_SIGMAS = 3.0
SMOOTHED_LINES = 5


class ExpectedCurve:
    """Compares the losses of a run with a reference."""

    def __init__(self, points: Sequence[tuple[float, float, float]]) -> None:
        """`points`: two or more, shares rising, sigmas above 0 (as `log.expected_loss` is checked)."""
        self._points = points
        self._recent: deque[float] = deque(maxlen=SMOOTHED_LINES)
        self._is_out = False

    def expected(self, share: float) -> tuple[float, float] | None:
        """Loss and sigma at a share of the budget; None outside of the reference."""
        shares = [point[0] for point in self._points]
        if not shares[0] <= share <= shares[-1]:
            return None
        right = min(bisect_right(shares, share), len(shares) - 1)
        low, high = self._points[right - 1], self._points[right]
        weight = (share - low[0]) / (high[0] - low[0])
        return low[1] + weight * (high[1] - low[1]), low[2] + weight * (high[2] - low[2])

    def compare(self, share: float, loss: float) -> tuple[dict[str, float], str | None]:
        """The journal's figures for a loss at a share of the budget, and a warning where it has just gone out."""
        self._recent.append(loss)
        point = self.expected(share)
        if point is None:
            return {}, None
        expected, sigma = point
        sigmas = (fmean(self._recent) - expected) / sigma
        was_out, self._is_out = self._is_out, abs(sigmas) > MAX_SIGMAS
        figures = {"expected/loss": expected, "expected/sigmas": sigmas}
        if was_out or not self._is_out:
            return figures, None
        return figures, (
            f"the training loss is {fmean(self._recent):.3f} after {100 * share:.0f} % of the budget, {abs(sigmas):.1f} sigma "
            f"{'above' if sigmas > 0 else 'below'} the {expected:.3f} that this profile reaches; look at data, precision and "
            "learning rate, or set log.expected_loss=null if the recipe was changed on purpose"
        )
