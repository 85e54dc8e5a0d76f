"""Continuous batching of jobs that come and go: answers are those of one job alone."""

import numpy as np
import pytest
from signals import noise_with_pauses

from fastslm_jax.inference import scheduler as scheduling
from fastslm_jax.inference.generator import Generator
from fastslm_jax.inference.long_form import Plan, Recording, Result
from fastslm_jax.inference.sampling import SamplingParams
from fastslm_jax.inference.scheduler import Job, Scheduler, TextPlan
from fastslm_jax.memory import CapacityError


def noise(seconds: float, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3000, round(16_000 * seconds)).astype(np.int16)


@pytest.fixture(scope="module")
def generator(model, params, prompt_tokenizer):
    return Generator(model, params, prompt_tokenizer)


@pytest.fixture
def make(generator):
    """make(samples, …) → a job; a text instead of samples is a prompt without audio."""

    def make(given, tokens=12, partial=False, sampling=SamplingParams(), **fields):
        if isinstance(given, str):
            plan = TextPlan(given, tokens)
        else:
            recording = Recording(
                len(given) / 16_000, lambda: given, max_new_tokens=tokens, **fields
            )
            plan = Plan(recording, generator.model.window)
        return Job(plan, sampling, partial)

    return make


def run(scheduler: Scheduler, most_steps: int = 1000) -> None:
    for _ in range(most_steps):
        if not scheduler.jobs:
            return
        scheduler.step()
    raise AssertionError("the jobs do not end")


def alone(generator, job: Job) -> Result:
    scheduler = Scheduler(generator, 4)
    scheduler.add(job)
    run(scheduler)
    return job.plan.result()


def test_jobs_that_join_get_the_answers_of_one_alone(generator, make):
    """Twelve recordings, texts and sampled answers in four rows, joining one by one."""
    sampled = SamplingParams(temperature=1.0, seed=3)
    long = noise_with_pauses(9, pauses=(2.5, 5.5))
    kinds = [
        lambda i: make(noise(0.5 + 0.4 * i, i), 3 + 5 * (i % 4)),
        lambda i: make("where did anna go" * (1 + i), 6 + i),
        lambda i: make(noise(1.1, i), 9, sampling=sampled, partial=True),
        lambda i: make(long, 8, segment_seconds=3.0, instruction=f"write {i}"),
    ]
    jobs = [kinds[i % 4](i) for i in range(12)]
    scheduler = Scheduler(generator, 4)
    for job in jobs:
        scheduler.add(job)
        scheduler.step()
    run(scheduler)
    for i, job in enumerate(jobs):
        again = kinds[i % 4](i)
        expected = alone(generator, again)
        found = job.plan.result()
        assert found.text == expected.text
        assert (found.stop_reason, found.new_tokens) == (
            expected.stop_reason,
            expected.new_tokens,
        )
        assert job.prompt_tokens == again.prompt_tokens > 0
    assert len({job.plan.result().text for job in jobs}) > 8


def test_answers_are_those_of_the_generator(generator, make):
    samples = noise(2.2, 5)
    recording = Recording(2.2, lambda: samples)
    request = Plan(recording, generator.model.window).request(
        Plan(recording, generator.model.window).pieces[0]
    )
    (answer,) = generator.answer([request], cache_length=1024, batch_size=4)
    assert alone(generator, make(samples, tokens=None)).text == answer.text


def test_a_short_job_overtakes_the_rest_of_a_long_one(generator, make):
    """A recording of eight segments leaves a row to a job that comes later."""
    long = make(
        noise_with_pauses(24, pauses=tuple(range(3, 24, 3))), 40, segment_seconds=3.0, partial=True
    )
    short = make(noise(1.0, 0), 4)
    scheduler = Scheduler(generator, 2)
    scheduler.add(long)
    scheduler.step()
    assert scheduler.rows_running == 2
    scheduler.add(short)
    while not short.plan.is_done:
        scheduler.step()
    assert not long.plan.is_done
    run(scheduler)


def test_a_cancelled_job_frees_its_rows(generator, make):
    scheduler = Scheduler(generator, 2)
    jobs = [make(noise(1.0, i), 500, partial=True) for i in range(3)]
    for job in jobs:
        scheduler.add(job)
    scheduler.step()
    assert [len(job.running) for job in jobs] == [1, 1, 0]
    scheduler.remove(jobs[0])
    scheduler.remove(jobs[0])
    scheduler.step()
    assert [len(job.running) for job in jobs] == [0, 1, 1]
    assert scheduler.jobs == jobs[1:]
    last = make(noise(1.3, 9), 6)
    scheduler.remove(jobs[1])
    scheduler.add(last)
    run(scheduler)
    expected = alone(generator, make(noise(1.3, 9), 6))
    assert last.plan.result().text == expected.text


def test_batches_are_limited_and_nobody_starves(generator, make, monkeypatch):
    monkeypatch.setattr(scheduling, "MAX_LANES", 2)
    samplings = [SamplingParams(temperature=0.5 + i) for i in range(4)]
    jobs = [make(noise(1.0, i), 6, sampling=s) for i, s in enumerate(samplings)]
    scheduler = Scheduler(generator, 2)
    for job in jobs:
        scheduler.add(job)
    scheduler.step()
    assert scheduler.rows_running == 2
    run(scheduler)
    assert all(job.plan.is_done for job in jobs)
    assert scheduler.rows_running == 0


def test_a_partial_job_advances_every_few_tokens(generator, make):
    job = make(noise(1.0, 0), 20, partial=True)
    scheduler = Scheduler(generator, 2)
    scheduler.add(job)
    counts = []
    while scheduler.jobs:
        assert scheduler.step() == [job]
        counts.append(job.plan.result().new_tokens)
    assert counts == [1, 5, 9, 13, 17, 20]


def test_a_job_that_does_not_fit_is_rejected_when_it_is_added(
    model, params, prompt_tokenizer, make
):
    small = Generator(model, params, prompt_tokenizer, native_positions=50)
    scheduler = Scheduler(small, 2)
    with pytest.raises(CapacityError, match="positions"):
        scheduler.add(make(noise(1.0, 0), 500))
    assert scheduler.jobs == []
