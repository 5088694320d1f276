"""A vector as one message between two parties: what a worker and a server send.

The codes are those of the reducers that bring their own exchange; the linear ones
(`random_k`, `low_rank`) live on all devices adding up, and have no message.
"""

from jmlp.compress import REDUCERS, Message
from jmlp.config.sections import ReducerConfig
from jmlp.errors import ConfigError


def make_message(settings: ReducerConfig, size: int) -> Message:
    """The message that `settings` ask for, for vectors of `size` numbers.

    Raises:
      ConfigError: the scheme has no message.
    """
    message = REDUCERS[settings.name].message
    if message is None:
        raise ConfigError(not_a_message())
    return message(settings, size)


def not_a_message() -> str:
    """Why a reducer is refused where a message is wanted, and which are not."""
    known = [name for name, scheme in REDUCERS.items() if scheme.message]
    return (
        f"a push or pull is a message: it may be {', '.join(known)}. Other reducers live on "
        "devices adding up"
    )
