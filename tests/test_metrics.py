"""What a run writes down."""

from q3n_functional import metrics


def test_what_an_earlier_attempt_wrote_beyond_the_checkpoint_is_dropped(tmp_path):
    with metrics.Log(tmp_path, 0) as log:
        for number in (1, 2, 3):
            log.write(number, {"loss": float(number)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    with metrics.Log(tmp_path, 2) as log:
        log.write(3, {"loss": 30.0})
    assert [row["loss"] for row in metrics.read(tmp_path / "metrics.jsonl")] == [1.0, 2.0, 30.0]
