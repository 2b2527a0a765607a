import random

from internals.pipeline import WAITING_BATCHES, batch_by_key, prefetch_map


def test_batches_have_one_key_and_keep_the_order_of_its_items():
    random.seed(0)
    items = [(random.choice("abc"), n) for n in range(100)]
    batches = list(batch_by_key(items, lambda item: item[0], 4))
    assert all(len({key for key, _ in batch}) == 1 for batch in batches)
    assert sum(len(batch) == 4 for batch in batches) > 20
    for key in "abc":
        found = [item for batch in batches for item in batch if item[0] == key]
        assert found == [item for item in items if item[0] == key]


def test_items_wait_for_others_with_their_key_but_not_for_ever():
    taken = []

    def count():
        for n in range(1000):
            taken.append(n)
            yield n

    batches = batch_by_key(count(), lambda n: n, 2)  # never two of one key
    assert next(batches) == [0]
    assert len(taken) == WAITING_BATCHES * 2 + 1
    assert [item for batch in batches for item in batch] == list(range(1, 1000))


def test_batches_of_one_do_not_wait():
    items = iter("abc")
    assert next(batch_by_key(items, str, 1)) == ["a"]
    assert list(items) == ["b", "c"]


def test_prefetch_map_keeps_the_order_and_works_a_few_items_ahead():
    taken = []
    results = prefetch_map(lambda n: taken.append(n) or n * n, iter(range(50)), threads=3, ahead=5)
    assert next(results) == 0
    assert len(taken) <= 7
    assert list(results) == [n * n for n in range(1, 50)]
