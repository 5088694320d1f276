"""Labels to class indices: one label is one class, whichever file or array it comes from."""

import numpy as np
import pytest
from files import load_file
from hypothesis import given, settings
from hypothesis import strategies as st

from jmlp.config.sections import DataConfig
from jmlp.data.labels import encode_labels
from jmlp.data.load import labelled_of, load
from jmlp.data.preparation import draw
from jmlp.data.words import is_number
from jmlp.errors import DataError

RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 3))
WHOLE = {"val_fraction": 0.0, "test_fraction": 0.0}


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text("0123456789.+-einfa_x ", min_size=1, max_size=4), min_size=2, unique=True))
def test_every_text_class_has_its_own_index(words):
    got = encode_labels(np.array(words, object), tuple(words))
    assert got.tolist() == list(range(len(words)))


@pytest.mark.parametrize(
    ("classes", "y", "want"),
    [
        (("01", "1", "a"), np.array(["1", "01", "a"], object), [1, 0, 2]),
        (("inf", "infinity"), np.array(["infinity", "inf"], object), [1, 0]),
        (("0", "1", "a"), np.array([1.0, 0.0, 2.0]), [1, 0, -1]),  # another file, all numbers
        ((0, 1, 2), np.array(["1", "2.0", "a"], object), [1, 2, -1]),
        (("01", "1", "a"), np.array([1.0]), [1]),  # as written, before another with zeros
        (("1", "01", "a"), np.array([1.0]), [0]),
        (("1", "01", "a"), np.array(["1.0"], object), [0]),
        (("maybe", "true"), np.array(["True"], object), [1]),  # a file of `true` alone
        (("1_0", "a"), np.array([10.0]), [-1]),
        (("1_0", "a"), np.array(["10", "1_0"], object), [-1, 0]),
        ((-1, 1), np.array([1, -1, 0]), [1, 0, -1]),
    ],
)
def test_labels_match_as_text_first_and_then_as_numbers(classes, y, want):
    assert encode_labels(y, classes).tolist() == want


def test_what_reads_as_a_number():
    good = ["1", "-1.5", "+.5", "3.", "1e5", "1E-5"]
    bad = ["", "1_0", "0x10", "nan", "inf", " 1", "1 ", "1e", ".", "1\n", "\u0662", "1,5"]
    assert [w for w in good + bad if is_number(w)] == good


@pytest.mark.parametrize(
    ("y", "classes"),
    [
        (np.array([1, 2] * 20, object), (1, 2)),
        (np.array([b"a", b"b"] * 20), ("a", "b")),
        (np.array([True, False] * 20, object), ("False", "True")),
        (np.array([True, False] * 20), ("False", "True")),
        (np.array([True, False] * 20)[:, None], ("False", "True")),
        ([[1], [2]] * 20, (1, 2)),
        (["x", "y"] * 20, ("x", "y")),
    ],
)
def test_label_arrays(y, classes):
    assert load(DataConfig(), 0, (X, y)).schema.classes == classes


@pytest.mark.parametrize("gap", [None, float("nan")])
def test_missing_labels_are_no_class(gap):
    y = ["a", "b"] * 19 + [gap, "a"]
    with pytest.raises(DataError, match="row 38: the target is missing"):
        load(DataConfig(), 0, (X, np.array(y, object)))
    dropped = load(DataConfig(missing="drop", **WHOLE), 0, (X, np.array(y, object)))
    assert dropped.schema.classes == ("a", "b")
    assert dropped.train.rows == 39


@pytest.mark.parametrize(
    ("y", "config", "said"),
    [
        (np.ma.masked_equal(np.arange(40) % 3, 2), {}, "row 2: the target is missing"),
        (np.array([{}, "b"] * 20, object), {}, "y: "),
        (np.array([["a", "b"]] * 40), {}, r"\(40, 2\)"),
        (np.zeros((40, 0)), {}, r"\(40, 0\)"),
        ([[1]] * 39 + [[1, 2]], {}, "y: "),
        (np.array([2**63 + 5, 1] * 20, np.uint64), {}, "9223372036854775813"),
        (np.array([2**60, 2**60 + 1] * 20), {}, "row 0: class 1152921504606846976"),
        (np.array([2.0**53, 5] * 20), {}, "row 0: class 9007199254740992.*letter"),
        (np.array([1e300, 2.0] * 20), {"task": "classification"}, r"row 0: class 1e\+300"),
        (["a", "b"] * 20, {"classes": 2}, "classes=2"),
        (np.zeros((40, 2)), {"classes": 2}, "classes=2"),
        (np.arange(40) % 2, {"classes": 2, "task": "regression"}, "classes=2"),
        (["1"] * 30 + ["oops"] * 10, {"task": "regression"}, "row 30: the target 'oops'"),
        ([str(i) for i in range(39)] + ["oops"], {}, "row 39: the target 'oops'.*40 different"),
    ],
)
def test_labels_refused(y, config, said):
    with pytest.raises(DataError, match=said):
        load(DataConfig(**config), 0, (X, y))


def test_a_table_of_numbers_is_evaluated_against_text_classes(tmp_path):
    rows = "".join(f"{i},{'01w'[i % 3]}\n" for i in range(30))
    (tmp_path / "a.csv").write_text("a,kind\n" + rows)
    (tmp_path / "b.csv").write_text("a,kind\n1,1\n1,0\n")
    test = {"test_path": str(tmp_path / "b.csv")}
    dataset = load_file(tmp_path / "a.csv", target="kind", **test)
    assert dataset.schema.classes == ("0", "1", "w")
    assert dataset.test.y.tolist() == [1, 0]
    (tmp_path / "b.csv").write_text("a,kind\n1,1\n1,7\n")
    with pytest.raises(DataError, match=r"b\.csv line 3: class 7 is out of range.*'0', '1', 'w'"):
        load_file(tmp_path / "a.csv", target="kind", **test)


@settings(max_examples=200, deadline=None)
@given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=30),
    fraction=st.floats(0.01, 0.95),
    seed=st.integers(0, 2**32 - 1),
)
def test_draws_have_the_exact_total_wherever_classes_can_give_it(counts, fraction, seed):
    y = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    chosen = draw(y, fraction, np.random.default_rng(seed))
    counts = np.array(counts)
    assert len(chosen) == min(max(1, round(len(y) * fraction)), (counts - 1).sum())
    assert (np.bincount(y[chosen], minlength=len(counts)) < counts).all()


def test_a_class_with_many_rows_gives_what_lone_rows_cannot():
    y = np.r_[np.arange(100), np.full(100, 100)]
    chosen = draw(y, 0.4, np.random.default_rng(0))
    assert len(chosen) == 80
    assert (y[chosen] == 100).all()


def test_rounding_alone_is_no_scale():
    noise = np.where(np.arange(40) % 3 == 0, 0.1 + 0.2, 0.3)
    stamps = 1.7e18 + RNG.normal(size=40) * 1e6  # nanoseconds: a spread of 6e-13 is real
    schema = load(DataConfig(**WHOLE), 0, (np.stack([noise, stamps], 1), np.arange(40) % 2)).schema
    assert schema.x_scale[0] == 1
    assert schema.x_scale[1] == pytest.approx(stamps.std(), rel=1e-3)


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (np.array([["1_0", "2"]] * 40, object), "x: "),
        ([[10**400]] * 40, "x"),
        (np.array(["2020-01-01"] * 40, "M8[D]"), "datetime64"),
        ([[1, 2]] * 39 + [[1]], "x: "),
        (np.ma.masked_equal(np.arange(80).reshape(40, 2), 3), "row 1, feature 1: .* missing"),
    ],
)
def test_features_refused(x, said):
    with pytest.raises(DataError, match=said):
        load(DataConfig(), 0, (x, np.arange(40) % 2))


def test_features_as_jax_may_have_them():
    import ml_dtypes

    exact = X.astype(ml_dtypes.bfloat16)
    got = load(DataConfig(**WHOLE), 0, (exact, np.arange(40) % 2))
    want = load(DataConfig(**WHOLE), 0, (exact.astype(np.float64), np.arange(40) % 2))
    assert got.fingerprint == want.fingerprint


def test_lone_rows_of_a_class_stay_in_training():
    y = np.r_[0, 1, 2, 3, np.full(36, 4)]
    dataset = load(DataConfig(), 0, (X, y))
    assert set(dataset.train.y.tolist()) == set(range(5))
    with pytest.raises(DataError, match="too few to draw"):
        load(DataConfig(), 0, (X[:2], ["a", "b"]))


HELD_OUT = {
    "fewer": (
        np.ones((40, 2)) * np.arange(40)[:, None] / 7,
        np.arange(40) / 7,
        "1 targets.* has 2",
    ),
    "more": (np.arange(40) / 7, np.ones((40, 3)), "3 targets.* has 1"),
    "text": (np.arange(40) / 7, ["a"] * 40, "the target 'a' is not a number"),
    "one-hot": (np.arange(40) % 2, np.eye(2)[np.arange(40) % 2], "2 targets.*one label a row"),
}


@pytest.mark.parametrize(("y", "other", "said"), HELD_OUT.values(), ids=HELD_OUT)
def test_targets_that_are_not_as_those_of_training(y, other, said):
    """One of two would be taken for both, and two columns of classes for two rows of them."""
    x = np.arange(80.0).reshape(40, 2)
    with pytest.raises(DataError, match=f"x_test row 0: {said}"):
        load(DataConfig(), 0, {"x": x, "y": y, "x_test": x, "y_test": other})
    with pytest.raises(DataError, match=f"x row 0: {said}"):
        labelled_of(x, other, load(DataConfig(), 0, (x, y)).schema)
