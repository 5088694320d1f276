"""What rows of measurements hold: of `jmlp comm` and `jmlp bench`, in memory as in their files."""

from typing import Generic, NotRequired, TypedDict, TypeVar

from jmlp.types import Json

R = TypeVar("R")


class CommRow(TypedDict):
    """A topology and a compressor over n devices, predicted and compiled."""

    topology: str
    reducer: str
    n: int
    size: int
    """float32 elements"""
    steps: int
    messages: int
    bytes_predicted: int
    bytes_compiled: int
    collectives: str


class Speeds(TypedDict):
    """What was timed in turn with others."""

    name: str
    samples_per_second: list[float]
    """of each run"""
    against: str
    """the row whose speed `ratio` is by"""


class CaseRow(Speeds):
    """Of `step`, `peers` and `stream`."""

    case: str
    ratio: float | None
    """None: not ranked"""
    accuracy: NotRequired[list[float]]
    epochs: NotRequired[int]
    peak_bytes: NotRequired[int]
    bare_bytes: NotRequired[int]


class ExchangeRow(Speeds):
    """Of `comm`."""

    ratio: float | None
    """None: not ranked"""
    size: int
    n: int


class WidthRow(Speeds):
    """Of `reproducible`."""

    width: int
    ratio: float
    rows_per_shard: int


class PopulationRow(TypedDict):
    """Of `population`."""

    name: str
    case: str
    """mixed, or the width of two hidden layers"""
    milliseconds: list[float]
    """a member and epoch, of each run"""
    ratio: float
    """how many times as fast as `against`"""
    against: str


class PushPullRow(TypedDict):
    """Of `push-pull`."""

    name: str
    bytes: int
    exchanges_per_second: list[float]
    median: float
    ratio: NotRequired[float]
    against: NotRequired[str]


class Model(TypedDict):
    """The model of a recipe."""

    hidden: list[int]
    activation: str


class Recipe(TypedDict, total=False):
    """What rows are of: numbers, or sections of the config that all were trained by."""

    cases: list[str]
    devices: int
    sizes: tuple[int, ...]
    sample: str
    limit_bytes: int
    rows_bytes: int
    table_rows: int
    batch: int
    virtual_shards: int
    workers: int
    hosts: int
    goal: float
    every: int
    exchanges: dict[int, int]
    data: dict[str, Json]
    model: Model
    mesh: dict[str, int]
    step: str
    comm: dict[str, Json]
    optim: dict[str, Json]
    train: dict[str, Json]


class Keys(TypedDict):
    """Sections of the config that differ from a recipe, of a run of `async`."""

    step: str
    train: dict[str, Json]
    server: NotRequired[dict[str, Json]]
    local: NotRequired[dict[str, Json]]
    optim: NotRequired[dict[str, Json]]


class CompressRuns(TypedDict):
    """Of `compress`: accuracies by seed."""

    name: str
    keys: Recipe
    accuracy: dict[str, float]
    bytes: int


class CompressRow(CompressRuns):
    """That, in the mean, and its bytes by those of `none`."""

    mean: float
    spread: float
    share: float


class Fitted(TypedDict):
    """A link by the alpha-beta model."""

    latency_seconds: float
    bytes_per_second: float
    worst: float
    """the largest relative error of the model, over the sizes that were measured"""


# `from` is no name that a class could have.
LinkRow = TypedDict(
    "LinkRow",
    {"from": int, "to": int, "latency_seconds": float, "bytes_per_second": float, "worst": float},
)


class AllReduceRow(TypedDict):
    """Of `links`: an all-reduce over all processes."""

    name: str
    bytes: int
    """of each process's array"""
    predicted_seconds: float
    measured_seconds: float


class Errors(TypedDict):
    """Of a topology's predictions: |predicted / measured - 1|."""

    median: float
    worst: float


Outcome = dict[str, float | None]
"""what came out of one run, by name; None: not reached"""


class AsyncRuns(TypedDict):
    """Of `async`: outcomes by seed."""

    name: str
    keys: Keys
    runs: dict[str, Outcome]


class AsyncRow(AsyncRuns):
    """That, in the mean."""

    mean: Outcome
    spread: Outcome


class NetworkRun(TypedDict):
    """Of `network`: one run over several hosts."""

    curve: list[tuple[float, float]]
    """(seconds from the start of the first step, accuracy of the validation rows)"""
    steps: int
    compile: float
    """seconds before that"""
    bytes: int
    """sent by the first host in a step, as its card counts"""


class NetworkRuns(TypedDict):
    """Of `network`: runs by seed."""

    name: str
    links: str
    method: str
    limit: float
    """seconds that links need for the dense exchange of all steps, and for nothing else"""
    runs: dict[str, NetworkRun]


class NetworkRow(NetworkRuns):
    """That, in the mean: seconds to the goal and to the end, accuracy there, compiling, bytes."""

    mean: Outcome
    spread: Outcome
    against: float | None
    """how many times as fast to the end as torch DDP; None: it was not run"""


class Result(TypedDict, Generic[R]):
    """Rows, what they are of, and where they were measured."""

    what: str
    rows: list[R]
    recipe: Recipe
    device: str
    processor: str
    versions: dict[str, str]
    simulated: bool


class LinksResult(Result[AllReduceRow]):
    """Of `links`: what `comm.links` reads is `processes`, `pairs` and `patterns`."""

    processes: int
    """or devices, of one process"""
    between: str
    """processes or devices"""
    pairs: list[LinkRow]
    patterns: dict[str, Fitted]
    inner: int | None
    """how many stand together, if some do"""
    errors: dict[str, Errors]
    """by topology"""
    compress: dict[str, float]
    """by compressor, seconds a number beside the messages"""
