"""Prediction of what a memory budget buys: speed, memory and quality of a model on a device, worked out without running
it.
"""

from moert.planning.predict import Prediction, predict
from moert.planning.recommend import Choice, recommend

__all__ = ["Choice", "Prediction", "predict", "recommend"]
