"""Every document is read once, however many launches and processes it takes."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tl_capacity.text.shares import Place, Share
from tl_capacity.text.streams import TokenStream


@given(
    lengths=st.lists(st.integers(1, 4), max_size=30),
    launches=st.lists(st.lists(st.integers(0, 60), min_size=1, max_size=5), max_size=4),
    last=st.integers(1, 6),
)
def test_each_row_is_read_once(lengths: list[int], launches: list[list[int]], last: int) -> None:
    """Launches end at any row of each of their processes; the last one reads what is left."""
    read: Counter[tuple[int, int]] = Counter()
    ended: tuple[tuple[Place, ...], ...] = ()
    for stops in (*launches, [10**6] * last):
        places = []
        for index, stop in enumerate(stops):
            share = Share(index, len(stops), ended)
            rows = [
                (document, row) for document, done, length in share(enumerate(lengths)) for row in range(done, length)
            ][:stop]
            read.update(rows)
            document = rows[-1][0] if rows else 0
            places.append(share.place(Place(document, sum(d == document for d, _ in rows))))
        ended = (*ended, tuple(places))
    assert read == Counter((document, row) for document, length in enumerate(lengths) for row in range(length))


def test_without_earlier_launches_it_is_every_nth() -> None:
    assert [number for number, done, _ in Share(2, 5)(enumerate("abcdefghijklm"))] == [2, 7, 12]


def test_json_gives_the_same_share() -> None:
    share = Share(1, 3, ((Place(4, 2), Place()), (Place(9, 1),)))
    assert Share.recorded(1, 3, share.to_json()) == share


@pytest.mark.parametrize("shard", [(0, 1), (1, 2)])
def test_a_stream_leaves_out_what_was_read(shard: tuple[int, int]) -> None:
    """Rows of token ids are documents of one row each."""
    ids = np.arange(40).reshape(20, 2)
    of_shard = ids[shard[0] :: shard[1]]
    first = [row for batch in TokenStream(ids, shard=shard, context=2, batch_rows=3) for row in batch.tokens.tolist()]
    assert first == of_shard.tolist()
    third = int(ids[shard[0] :: shard[1]][2, 0]) // 2
    share = Share(0, 1, ((Place(third, 1),),))
    rest = [row for batch in TokenStream(ids, shard=shard, context=2, share=share) for row in batch.tokens.tolist()]
    assert rest == of_shard[3:].tolist()
