from __future__ import annotations

import torch

from diffusers_ext.core.second_moment import SecondMoment
from diffusers_ext.nullspace.statistics import FeatureStatistics
from diffusers_ext.training.nullspace.statistics import format_table, report_rows


def test_null_dimensions_are_counted_below_the_threshold():
    moment = SecondMoment.from_total(torch.diag(torch.tensor([4.0, 1.0, 0.02, 0.0])) * 10, 10)
    statistics = FeatureStatistics({"text": moment}, {"mid.attn2.to_k": "text"}, {})
    (row,) = report_rows(statistics, threshold=0.1)
    assert row["null_dims"] == 2
    assert (row["matrix"], row["dim"], row["vectors"], row["linears"]) == ("text", 4, 10, 1)
    assert report_rows(statistics, threshold=1e-3)[0]["null_dims"] == 1


def test_table_columns_are_aligned():
    table = format_table([{"matrix": "a", "trace": 1.23456, "rank": 7},
                          {"matrix": "longer", "trace": 1e-7, "rank": 1234}])  # fmt: skip
    assert table == (
        "matrix  trace  rank\na       1.235     7\nlonger  1e-07  1234"
    )  # fmt: skip
