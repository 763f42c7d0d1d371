"""What keeps a request from its answer."""

from mptbook.settings import Ended

NOT_FINITE = "the model gave logits that are not finite"


class Busy(Exception):
    """The queue is full; ask again later."""


class Stopping(Exception):
    """No more requests are taken; ask another engine."""


class Unanswered(Ended):
    """A request that could not be finished, by no fault of its own."""

    code = 1
