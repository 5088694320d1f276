"""Name of an engine to what it is. See `engine.Engine`."""

from jmlp.parameter_server.engine import Engine
from jmlp.parameter_server.ray_engine import RayEngine
from jmlp.parameter_server.replay import Replay
from jmlp.parameter_server.threads import Threads

ENGINES: dict[str, type[Engine]] = {"replay": Replay, "threads": Threads, "ray": RayEngine}
