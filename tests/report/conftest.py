"""Runs as notebook 06 leaves them."""

import pandas as pd
import pytest

from lib.pipeline import params


@pytest.fixture
def scored(house):
    """scored(profile, row, {task: nDCG@10 of its queries q0, q1, …}): write per_query.parquet.

    seed: of a row with several; its folder is the one of `params.trainings`.
    """

    def write(profile, row, values: dict[str, list[float]], reads=("all",), seed=None) -> None:
        lines = [
            {"task": task, "source": "", "reads": read, "qid": f"q{i}", "ndcg@10": value}
            for task, own in values.items()
            for read in reads
            for i, value in enumerate(own)
        ]
        place = params.trainings(profile, row)[seed] if seed else row
        folder = params.data(profile) / "runs" / place
        folder.mkdir(parents=True)
        pd.DataFrame(lines).to_parquet(folder / "per_query.parquet")

    return write
