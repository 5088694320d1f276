"""How many steps a call makes."""

from helpers import prepared

from jmlp.training.feed import CAPACITY, ResidentFeed


def test_calls_grow_fourfold_at_most_to_what_an_order_holds_and_shrink_to_one_step(blobs):
    setup = prepared(blobs, {"mesh": {"data": 1}})
    feed = ResidentFeed(setup.programs, setup.dataset.train, setup.plan)

    def steps_after(took_s: float) -> int:
        feed._span = feed._span._replace(steps=feed._most)  # a whole call
        feed.pace(took_s)
        return feed._most

    feed.pace(1e9)  # of a call that was cut short by an epoch's end: says nothing
    assert feed._most > 1
    assert steps_after(1e9) == 1
    assert steps_after(1e-9) == 4
    sizes = [steps_after(1e-9) for _ in range(20)]
    assert sizes[0] == 16
    assert sizes[-1] == CAPACITY
    assert steps_after(1e9) == 1
