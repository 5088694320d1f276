"""What makes steps and starts faster: kernels, the cache, the loss; and what measures them."""

import os
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import config_of, run_steps

import jmlp
from jmlp.analysis.choices import choices
from jmlp.bench import comm, step, stream
from jmlp.bench.resume import described
from jmlp.bench.timing import Case, compared, interleaved, parse_cases
from jmlp.errors import ConfigError
from jmlp.losses import cross_entropy
from jmlp.programs import cache
from jmlp.programs.kernels import choose, compile_for
from jmlp.programs.placement import DataPlacement
from jmlp.report import Reporter
from jmlp.training.setup import prepare

# Kernels.


@pytest.mark.parametrize(
    ("keys", "platform", "kernels"),
    [
        ({"train": {"batch_size": 64}}, "cpu", "eigen"),
        ({"train": {"batch_size": 63}}, "cpu", "xla"),
        ({"train": {"batch_size": 64}, "model": {"hidden": [129]}}, "cpu", "xla"),
        ({"train": {"batch_size": 64}, "model": {"hidden": [128, 128]}}, "cpu", "eigen"),
        ({"train": {"batch_size": 64}, "mesh": {"data": 2}}, "cpu", "xla"),
        ({"train": {"batch_size": 64}, "reproducible": True}, "cpu", "xla"),
        ({"train": {"batch_size": 8, "kernels": "eigen"}}, "cpu", "eigen"),
        ({"train": {"batch_size": 64, "kernels": "xla"}}, "cpu", "xla"),
        ({"train": {"batch_size": 64, "kernels": "eigen"}}, "gpu", "xla"),
    ],
)
def test_kernels_are_chosen_by_size(blobs, keys, platform, kernels):
    setup = prepare(config_of({"mesh": {"data": 1}, "model": {"hidden": [64]}}, keys), blobs)
    assert choose(setup.config, setup.programs.abstract.params, platform)[0] == kernels


def _product():
    x, w = jnp.ones((64, 784)), jnp.ones((784, 64))
    return jax.jit(lambda x, w: jax.nn.relu(x @ w)).lower(x, w), x, w


def test_eigens_kernels_are_in_the_program():
    lowered, x, w = _product()
    xla, eigen = (compile_for(lowered, kernels) for kernels in ("xla", "eigen"))
    assert "ynn" in xla.as_text()
    assert "ynn" not in eigen.as_text()
    np.testing.assert_allclose(xla(x, w), eigen(x, w), rtol=1e-6)


def test_an_xla_without_the_option_takes_its_own(monkeypatch):
    monkeypatch.setattr("jmlp.programs.kernels._EIGEN", {"xla_no_such_option": 1})
    lowered, x, w = _product()
    assert float(compile_for(lowered, "eigen")(x, w)[0, 0]) == 784


def test_kernels_change_rounding_alone(blobs):
    """Both ways of multiplying train the same run, through the loop's own compiling."""
    found = {}
    for kernels in ("xla", "eigen"):
        keys = {"mesh": {"data": 1}, "train": {"kernels": kernels}}
        setup = prepare(config_of(keys), blobs)
        setup.programs.train.run = _compiled(setup, kernels)
        found[kernels] = run_steps(setup)[1]
    np.testing.assert_allclose(found["eigen"], found["xla"], rtol=1e-5)


def _compiled(setup, kernels):
    run = setup.programs.train.run
    return lambda *args: compile_for(run.lower(*args), kernels)(*args)


# The loss.


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_cross_entropy_is_optaxs(smoothing):
    rng = np.random.default_rng(0)
    z = jnp.array(rng.normal(size=(50, 7)) * 30, jnp.float32)
    y = jnp.array(rng.integers(0, 7, 50), jnp.int32)

    def theirs(z):
        targets = optax.smooth_labels(jax.nn.one_hot(y, 7), smoothing)
        return optax.softmax_cross_entropy(z, targets)

    mine = lambda z: cross_entropy(z, y, smoothing)  # noqa: E731
    np.testing.assert_allclose(mine(z), theirs(z), rtol=2e-5, atol=1e-5)
    grads = [jax.grad(lambda z, f=f: f(z).sum())(z) for f in (mine, theirs)]
    np.testing.assert_allclose(*grads, atol=2e-6)
    far = jnp.array([[1e30, -1e30, 0.0]])  # neither overflows nor is NaN
    assert float(cross_entropy(far, jnp.array([0]))[0]) == 0
    hlo = jax.jit(jax.grad(lambda z: mine(z).sum())).lower(z).as_text()
    assert "scatter" not in hlo and "gather" not in hlo


# The compilation cache.


@pytest.fixture
def no_cache(monkeypatch, tmp_path):
    """jax as a user's process finds it: nothing told; and a folder for the cache."""
    kept = jax.config.jax_compilation_cache_dir
    least = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("JMLP_CACHE", str(tmp_path / "programs"))
    yield tmp_path / "programs"
    jax.config.update("jax_compilation_cache_dir", kept)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
    from jax.experimental.compilation_cache import compilation_cache

    compilation_cache.reset_cache()


def test_programs_are_kept(no_cache, blobs):
    path = cache.start_cache()
    assert path is not None and path.parent == no_cache
    assert path.stat().st_mode & 0o777 == 0o700
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    prepare(config_of({"mesh": {"data": 1}}), blobs).programs.init(0)
    assert list(path.glob("*-cache"))


def test_jaxs_own_settings_and_off_come_first(no_cache, monkeypatch):
    for word in ("off", "0", "none"):
        monkeypatch.setenv("JMLP_CACHE", word)
        assert cache.folder() is None and cache.start_cache() is None
    assert jax.config.jax_compilation_cache_dir is None
    monkeypatch.setenv("JMLP_CACHE", str(no_cache))
    jax.config.update("jax_compilation_cache_dir", "/told")
    assert cache.start_cache() is None
    assert jax.config.jax_compilation_cache_dir == "/told"


def test_a_folder_that_cannot_be_made_stops_nothing(no_cache, monkeypatch):
    no_cache.write_text("a file")
    assert cache.start_cache() is None
    monkeypatch.delenv("JMLP_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(cache.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert cache.start_cache() is None


def test_other_machines_programs_are_apart(no_cache, monkeypatch):
    first = cache.folder()
    monkeypatch.setattr(cache, "cpu_features", lambda: "sse avx9000")
    second = cache.folder()
    monkeypatch.setenv("XLA_FLAGS", "--xla_some=1")
    assert len({first, second, cache.folder()}) == 3


def test_the_cache_is_pruned(tmp_path):
    whole = zlib.compress(os.urandom(1000))
    for age, name in enumerate(["new", "old", "older"]):
        entry = tmp_path / f"{name}-cache"
        entry.write_bytes(whole)
        os.utime(entry, (1e9 - age, 1e9 - age))
    torn = tmp_path / "torn-cache"
    torn.write_bytes(whole[:-20])
    (tmp_path / "other").write_bytes(b"not ours")
    cache.prune(tmp_path, 2500)
    assert {p.name for p in tmp_path.iterdir()} == {"new-cache", "old-cache", "other", "checked"}
    cache.prune(tmp_path, 1500)
    assert {p.name for p in tmp_path.glob("*-cache")} == {"new-cache"}


# What auto chose.


def test_choices_say_why(blobs):
    told = config_of({"mesh": {"data": 2}, "step": "explicit", "comm": {"all_reduce": "auto"}})
    found = {c.key: c for c in choices(told, prepare(told, blobs))}
    assert found["mesh"].value == "data=2, fsdp=1, model=1, pipe=1"
    assert "simulated" in found["mesh"].why
    assert found["data.placement"].value == "device" and "MB" in found["data.placement"].why
    assert found["train.kernels"].value == "xla"
    assert "bucket 0" in found["comm.all_reduce"].why
    host = told.model_copy(update={"data": told.data.model_copy(update={"placement": "host"})})
    found = {c.key: c for c in choices(host, prepare(host, blobs))}
    assert found["data.placement"].why == "as configured"
    assert found["train.steps_per_call"].value == 1024


def test_many_rows_are_gathered_ahead_of_a_cpus_step(blobs, monkeypatch):
    monkeypatch.setattr("jmlp.training.feed._GATHER_BYTES", 1000)
    train = {"train": {"epochs": 2, "batch_size": 32}}
    told = {"step": "single", "data": {"placement": "device"}} | train
    want = jmlp.train(config_of(told), blobs)
    config = config_of({"step": "single"} | train)
    setup = prepare(config, blobs)
    found = next(c for c in choices(config, setup) if c.key == "data.placement")
    assert found.value == "host" and "a thread gathers" in found.why
    got = jmlp.train(config, blobs)
    assert got.summary["fingerprint"] == want.summary["fingerprint"]
    for other in ({"mesh": {"data": 2}}, {"step": "single", "reproducible": True}):
        config = config_of(other)  # sends each device its part; has the bits of more devices
        found = next(c for c in choices(config, prepare(config, blobs)) if c.key == found.key)
        assert found.value == "device"


# Benches.


def test_cases():
    case = parse_cases(["512-256/64"])[0]
    assert case == Case((512, 256), 64) and case.name == "512-256/64"
    products = [(784, 512), (512, 256), (256, 10)]
    assert case.sizes == products
    assert case.flops_per_sample == 6 * sum(a * b for a, b in products) - 2 * 784 * 512


@pytest.mark.parametrize("text", ["512", "512/", "/64", "0/64", "64x64/64", "64-64/064", "a-b/c"])
def test_cases_refused(text):
    with pytest.raises(ConfigError, match=r"--cases .*512-512/256"):
        parse_cases([text])


def test_interleaved_and_compared():
    calls = []
    answers = {"a": iter([0, 10, 20, 60]), "b": iter([0, 10, 10, 10])}
    timed = {n: (lambda n=n: (calls.append(n), next(answers[n]))[1]) for n in answers}
    samples = interleaved(timed, 3)
    assert calls == ["a", "b"] * 4  # in turn, and the first round for nothing
    assert samples == {"a": [10, 20, 60], "b": [10, 10, 10]}
    rows = compared(Case((8,), 4), samples, "b")
    assert [row["ratio"] for row in rows] == [2, 1]
    assert rows[0]["samples_per_second"] == [10, 20, 60] and rows[0]["against"] == "b"
    unranked = compared(Case((8,), 4), samples, "b", simulated=True)
    assert [row["ratio"] for row in unranked] == [None, None]


@pytest.mark.slow
@jax.numpy_rank_promotion("allow")  # loops by hand are written as people write them
def test_bench_step_measures_every_row(monkeypatch):
    monkeypatch.setattr(step, "TARGET_S", 1e-9)
    monkeypatch.setattr(step, "ROWS", 256)
    found = step.measure([Case((8,), 16)], 2, Reporter.quiet())
    names = [row["name"] for row in found["rows"]]
    assert names == "jmlp,loop,scan,hand,hand 2,products,products 2,rate".split(",")
    assert all(len(row["samples_per_second"]) == 2 for row in found["rows"])
    assert all(min(row["samples_per_second"]) > 0 for row in found["rows"])
    assert found["simulated"] and found["rows"][0]["ratio"] is None  # eight devices here
    with pytest.raises(ConfigError, match="there are jmlp, loop"):
        step.measure([Case((8,), 16)], 1, Reporter.quiet(), ["handy"])


@jax.numpy_rank_promotion("allow")
def test_hand_written_loops_learn():
    """Else they would be no measure of a training loop."""
    from jmlp.bench import loops

    rng = np.random.default_rng(0)
    y = rng.integers(0, 10, 512).astype(np.int32)
    x = (rng.normal(size=(512, 784)) * 20 + rng.normal(size=(10, 784))[y] * 40 + 128).clip(0, 255)
    x = x.astype(np.uint8)
    plain = ((x - x.mean()) / x.std()).astype(np.float32)
    ended = []
    loops.loop(Case((16,), 64), plain, y, 40, ended.append)()
    accuracy = (np.asarray(loops.logits(ended[0], jnp.array(plain))).argmax(-1) == y).mean()
    assert accuracy > 0.9


def test_bench_comm_ranks_nothing_here():
    known = {"psum none": ("psum", "none"), "ring int8": ("ring", "int8")}
    rows = comm.measure(known, jax.devices()[:2], 1000, 1, simulated=True)
    assert [row["ratio"] for row in rows] == [None, None]
    assert all(row["samples_per_second"][0] > 0 for row in rows)
    assert comm.measure(known, jax.devices()[:2], 1000, 1, False)[0]["ratio"] == 1
    assert len(comm._names()) == len(set(comm._names())) >= 18


@pytest.mark.slow
def test_bench_stream_shows_memory_and_speed(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "TARGET_S", 1e-9)
    files = stream.write(tmp_path, 2_000_000)
    rows = stream.measure(Case((8,), 16), files, 1000, 1, Reporter.quiet(), ("device", "parquet"))
    assert [row["name"] for row in rows] == ["device", "parquet"]
    assert all(row["peak_bytes"] > row["bare_bytes"] > 1 << 20 for row in rows)


def test_results_name_the_machine():
    found = described("step", {}, [])
    assert found["versions"]["jax"] == jax.__version__
    assert found["processor"] and found["simulated"]


# Traces.


def test_programs_trace_their_batch_once(blobs, monkeypatch):
    traced = []
    batch = DataPlacement.batch
    monkeypatch.setattr(
        DataPlacement, "batch", lambda *args: traced.append(args[2].aval) or batch(*args)
    )
    setup = prepare(config_of({"mesh": {"data": 2}, "model": {"hidden": [8]}}), blobs)
    state, _ = run_steps(setup, epochs=1)
    assert len(traced) == 1
    setup.programs.evaluate(state, setup.dataset.train)
    assert len(traced) == 2
