"""What stages took before is that of the last run that ran them."""

from pathlib import Path

from cm3leon.config.schema import Config
from cm3leon.tracking.durations import last_seconds
from cm3leon.tracking.runs import Run, pipeline_run


def test_seconds_are_of_the_last_run_of_the_profile_that_ran_the_stage(project: Path) -> None:
    def record(profile: str, **seconds: float) -> None:
        with pipeline_run(Config(profile=profile)) as run:
            run.log_metrics({f"pipeline/{stage}_seconds": value for stage, value in seconds.items()})
            run.log_metrics({"pipeline/seconds": 99.0, "pipeline/sft_peak_megabytes": 7.0})

    record("tiny", ingest=10.0, sft=20.0)
    record("tiny", sft=30.0)
    record("small", ingest=500.0)
    with pipeline_run(Config(profile="tiny")) as run:
        run.log_metrics({"pipeline/sft_seconds": 40.0})
        run.flush()
        assert last_seconds(run, "tiny") == {"ingest": 10.0, "sft": 30.0}
        assert last_seconds(run, "small") == {"ingest": 500.0} and last_seconds(run, "gpu") == {}
    assert last_seconds(Run(), "tiny") == {}
