"""Where documents begin in a block."""

import torch

from pmp_ds.data.documents import document_positions


def test_by_hand():
    ids = torch.tensor(
        [
            [5, 5, 2, 5, 2, 2, 5, 5],  # a document, another, an empty one, the start of a fourth
            [2, 5, 5, 5, 5, 5, 5, 2],
            [5, 5, 5, 5, 5, 5, 5, 5],
        ]
    )
    assert document_positions(ids, 2).tolist() == [
        [0, 1, 2, 0, 1, 0, 0, 1],
        [0, 0, 1, 2, 3, 4, 5, 6],
        [0, 1, 2, 3, 4, 5, 6, 7],
    ]
