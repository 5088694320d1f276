"""scikit-learn's interface for what jmlp trains: estimators and a search.

The two estimators: `classifier`, `regressor`; what they share: `base`. From scikit-learn's
parameters to a config, and what is refused: `parameters`. A fit over jmlp's loop, when it ends,
and its weights as plain arrays: `fitting`. Programs that fits share in a process: `sharing`.
Searches: `search`; their fits as members of populations: `candidates`.
"""

from jmlp.estimators.classifier import MLPClassifier
from jmlp.estimators.regressor import MLPRegressor
from jmlp.estimators.search import PopulationSearchCV

__all__ = ["MLPClassifier", "MLPRegressor", "PopulationSearchCV"]
