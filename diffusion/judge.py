"""Are generated images recognisable? A classifier trained on real ones says of what class each is, and how sure it is."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int64

from hopjax.data import DataError, Images

# An image is accepted if the classifier is surer than this.
CONFIDENCE = 0.9


class Verdicts(NamedTuple):
    """Of each image: its class, a label of the data, and the probability that the classifier gives it."""

    labels: Int64[np.ndarray, " n"]
    confidence: Float[np.ndarray, " n"]

    def accepted(self, confidence: float = CONFIDENCE) -> tuple[float, float]:
        """The fraction of images that are accepted, and its binomial standard error."""
        rate = float(np.mean(self.confidence > confidence))
        return rate, (rate * (1 - rate) / len(self.confidence)) ** 0.5


class Judge:
    """A support-vector classifier with a Gaussian kernel on unit-variance pixels, its scores calibrated to probabilities by
    cross-validation (Platt's sigmoid). It does not generalise to what is no image of any class: noise may be accepted."""

    def __init__(self, images: Images, *, seed: int = 0) -> None:
        """Learn from labelled images.

        Raises: DataError if there are no labels, or fewer than two classes, or fewer than five images of one.
        """
        from sklearn.calibration import CalibratedClassifierCV
        from sklearn.model_selection import StratifiedKFold
        from sklearn.svm import SVC

        if images.labels is None:
            raise DataError(f"{images.source}: has no labels to learn from")
        counts = np.unique(images.labels, return_counts=True)[1]
        if len(counts) < 2 or counts.min() < 5:
            raise DataError(f"{images.source}: need at least two classes of five images each to learn from")
        folds = StratifiedKFold(5, shuffle=True, random_state=seed)
        self.labels = images.labels
        self._classifier: Any = CalibratedClassifierCV(SVC(C=10.0, gamma="scale"), cv=folds, ensemble=False)
        self._classifier.fit(images.vectors(), images.labels)

    def __call__(self, images: Images) -> Verdicts:
        """The class and confidence of each image, which must be of the size that was learnt."""
        probabilities = self._classifier.predict_proba(images.vectors())
        return Verdicts(self._classifier.classes_[probabilities.argmax(axis=1)].astype(np.int64), probabilities.max(axis=1))
