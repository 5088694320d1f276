"""scikit-learn's own checks of an estimator."""

import pytest
from sklearn.utils import estimator_checks as checks

from jmlp import MLPClassifier, MLPRegressor

BOTH = pytest.mark.parametrize("make", [MLPClassifier, MLPRegressor])
# It asks for 1e-7 of predictions that are computed in float32, and repeats rows, which changes
# the mean and deviation that inputs and targets are scaled by: those are of rows, not of weights.
# What holds without the scale, to float32, is in test_estimators.py.
EXPECTED = {
    "check_sample_weight_equivalence_on_dense_data": "scale is by rows, arithmetic float32",
}
QUICK = {
    "check_estimator_cloneable", "check_estimator_tags_renamed", "check_valid_tag_types",
    "check_estimator_repr", "check_no_attributes_set_in_init", "check_fit_score_takes_y",
    "check_complex_data", "check_dtype_object", "check_estimators_nan_inf", "check_dict_unchanged",
    "check_estimator_sparse_array", "check_do_not_raise_errors_in_init_or_set_param",
    "check_parameters_default_constructible", "check_get_params_invariance", "check_set_params",
    "check_requires_y_none", "check_fit1d", "check_fit2d_predict1d", "check_classifiers_one_label",
    "check_supervised_y_no_nan", "check_n_features_in_after_fitting", "check_estimators_unfitted",
}  # fmt: skip


@pytest.mark.slow
@BOTH
def test_the_quick_checks(make):
    small = make(hidden_layer_sizes=4, max_iter=2, tol=0, mesh={"data": 1})
    done = set()
    for estimator, check in checks.estimator_checks_generator(small):
        name = getattr(check, "func", check).__name__
        if name in QUICK:
            check(estimator)
            done.add(name)
    assert len(done) > 15, done


@pytest.mark.slow
@pytest.mark.parametrize(("make", "devices"), [(MLPClassifier, 2), (MLPRegressor, 1)])
def test_all_checks(make, devices):
    results = checks.check_estimator(
        make(max_iter=100, mesh={"data": devices}),
        expected_failed_checks=EXPECTED, on_skip=None,
    )  # fmt: skip
    assert {one["check_name"] for one in results if one["status"] == "xfail"} == set(EXPECTED)
