"""The seam: what enters the model is moved as a whole."""

import torch

from incipit.injection import Injection


def test_what_stands_elsewhere_than_its_rows_is_moved_too() -> None:
    """Rows come from the batch, numbers from the prompt: either may be on the device already."""
    rows, live = torch.zeros(1, dtype=torch.int64), torch.ones(1, 2, dtype=torch.bool)
    for part in (
        Injection(rows.to("meta"), inputs=torch.zeros(1, 2, 3), live=live),
        Injection(rows, inputs=torch.zeros(1, 2, 3, device="meta"), live=live),
    ):
        moved = part.to("meta")
        assert moved.inputs is not None and moved.live is not None
        assert {t.device.type for t in (moved.rows, moved.inputs, moved.live)} == {"meta"}
        assert moved.to("meta") is moved
