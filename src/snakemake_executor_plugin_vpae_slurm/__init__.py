"""Snakemake's SLURM executor, made to survive what happens to jobs that run for days: `executor: vpae-slurm`.

It submits as `snakemake-executor-plugin-slurm` does. But that plugin (2.8.0) does not notice the end of some jobs, and
then the workflow waits for ever:

- A job preempted by cancelling is PREEMPTED. The plugin leaves it to SLURM to resume it, which SLURM will not.
- A job that ended longer ago than SLURM remembers (MinJobAge) is in no list any more.
- While SLURM does not answer, or `sacct` has no database, the plugin forgets the jobs it has asked about.

Here the first kind of job has failed, and is retried like any other. For the second, the accounting is asked; where
there is none, Snakemake goes by the output, which a stage writes whole or not at all. In the third case all jobs go on
being watched.

A Snakemake that was killed leaves its jobs behind. Started again, it would submit them a second time beside the first,
and delete what those may just have finished. Such orphans are told to end, which lets them save their states, before
their successors are submitted.
"""

import asyncio
import shlex
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path

from snakemake_executor_plugin_slurm import Executor as SlurmExecutor
from snakemake_executor_plugin_slurm import (
    ExecutorSettings,
    JobExecutorInterface,
    SubmittedJobInfo,
    WorkflowError,
    common_settings,
)
from snakemake_executor_plugin_slurm.utils import get_job_wildcards

from vpae.locks import lock

__all__ = ["Executor", "ExecutorSettings", "common_settings"]

FAILED = {"CANCELLED", "DEADLINE", "ERROR", "FAILED", "OUT_OF_MEMORY", "REVOKED", "TIMEOUT"}
# Failed, too, unless SLURM is just about to queue the job again: then the next look finds another state.
FAILED_IF_IT_STAYS = {"BOOT_FAIL", "NODE_FAIL", "PREEMPTED"}
SLOWEST_LOOK_SECONDS = 60
ORPHANS_MUST_END_WITHIN_SECONDS = 600
RUNS = Path(".snakemake/slurm_runs")


class Executor(SlurmExecutor):
    """Submits as the parent class does; watches the jobs itself."""

    def __post_init__(self, test_mode: bool = False) -> None:
        super().__post_init__(test_mode)
        self._last_seen: dict[str, str | None] = {}
        self._others = self._jobs_of_others()
        # Locked as long as this process lives, so that others can tell whether it does.
        RUNS.mkdir(parents=True, exist_ok=True)
        self._alive = ExitStack()
        self._alive.enter_context(lock(RUNS / self.run_uuid))

    def run_job(self, job: JobExecutorInterface) -> None:
        """Submit a job, after the end of one that an earlier Snakemake may have left behind."""
        try:
            self._end_orphan(job)
        except WorkflowError as error:
            self._report_job_error_threadsafe(SubmittedJobInfo(job), str(error))
            return
        super().run_job(job)

    def get_account_arg(self, job: JobExecutorInterface) -> Iterator[str]:
        """The account, if there is one, and how long before its time limit the job is told to end.

        sbatch judges the account: the parent class guesses and asks, which takes accounting. What follows it in the
        command is the place to add what the parent class knows nothing of; `slurm_extra` comes later and prevails.
        """
        account, seconds = job.resources.get("slurm_account"), job.resources.get("warning_seconds")
        warning = f" --signal=TERM@{seconds}" if seconds else ""
        yield (f" -A {shlex.quote(str(account))}" if account else "") + warning

    def shutdown(self) -> None:
        """Leave no file behind."""
        super().shutdown()
        self._alive.close()
        (RUNS / self.run_uuid).unlink(missing_ok=True)

    async def check_active_jobs(self, active_jobs: list[SubmittedJobInfo]) -> AsyncIterator[SubmittedJobInfo]:
        """Report the jobs that have ended; yield the others, which are then asked about again."""
        first_wait = self.workflow.executor_settings.init_seconds_before_status_checks
        if not active_jobs:
            self.next_seconds_between_status_checks = first_wait
            return
        async with self.status_rate_limiter:
            states = await self._states()
        ended = False
        for info in active_jobs:
            state = "UNANSWERED" if states is None else states.get(info.external_jobid)
            before = self._last_seen.pop(info.external_jobid, "NEW")
            final = state is None and before is None
            if final:
                state = await self._accounted(info.external_jobid)
            if state == "COMPLETED":
                self.report_job_success(info)
                ended = True
            elif state in FAILED or (state in FAILED_IF_IT_STAYS and (final or state == before)):
                log = info.aux.get("slurm_logfile")
                self.report_job_error(info, f"SLURM job {info.external_jobid}: {state}. ", aux_logs=[str(log)])
                ended = True
            else:
                self._last_seen[info.external_jobid] = state
                yield info
        longer = min(2 * self.next_seconds_between_status_checks, max(SLOWEST_LOOK_SECONDS, first_wait))
        self.next_seconds_between_status_checks = first_wait if ended else longer

    async def _states(self) -> dict[str, str] | None:
        """Job -> state, of all jobs of this run that SLURM remembers; None if SLURM does not answer."""
        out = await _answer(f"squeue --noheader --array --states=all --format=%i|%T --name={self.run_uuid}")
        return None if out is None else dict(line.strip().split("|") for line in out.splitlines())

    async def _accounted(self, job_id: str) -> str:
        """The state of a job that SLURM has forgotten, from the accounting; without that, as if it had ended well."""
        out = await _answer(f"sacct --noheader --parsable2 --allocations --format=State --jobs={job_id}")
        words = (out or "").split()  # "CANCELLED by 1000"
        if words:
            return words[0]
        self.logger.warning(
            f"SLURM has forgotten job {job_id}, and there is no accounting to ask: whether it ended well is judged by "
            "its output. A longer MinJobAge in slurm.conf avoids this."
        )
        return "COMPLETED"

    def _end_orphan(self, job: JobExecutorInterface) -> None:
        """Cancel the job of a dead Snakemake that would write what this job writes, and wait for its end.

        Raises:
            WorkflowError: the other Snakemake is alive, or its job does not end.
        """
        wildcards = get_job_wildcards(job)
        name = f"rule_{job.name}" + (f"_wildcards_{wildcards}" if wildcards else "")
        job_id, run = self._others.get(name, ("", ""))
        if not job_id:
            return
        if _is_alive(run):
            raise WorkflowError(
                f"SLURM job {job_id} does the same for another Snakemake: wait until it ends, or end it. "
            )
        self.logger.info(f"SLURM job {job_id}, of a Snakemake that was killed, is told to save its state and end.")
        _ask("scancel", job_id)
        deadline = time.monotonic() + ORPHANS_MUST_END_WITHIN_SECONDS
        while job_id in _ask("squeue", "--me", "--noheader", "--format=%i").split():
            if time.monotonic() > deadline:
                raise WorkflowError(f"SLURM job {job_id} does not end; cancel it, then start again. ")
            time.sleep(2)
        del self._others[name]

    def _jobs_of_others(self) -> dict[str, tuple[str, str]]:
        """Unfinished jobs that other runs have submitted from this folder: rule and wildcards -> (job, run)."""
        lines = _ask("squeue", "--me", "--noheader", "--format=%k|%Z|%i|%j").splitlines()
        jobs = [line.split("|") for line in lines]
        ours = [job for job in jobs if len(job) == 4]  # a comment of somebody's own may have several lines
        return {job[0]: (job[2], job[3]) for job in ours if job[1] == str(self.workflow.workdir_init)}


def _ask(*command: str) -> str:
    """What one of SLURM's commands prints.

    Raises:
        WorkflowError: it failed.
    """
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except FileNotFoundError as error:
        raise WorkflowError(f"{command[0]} is not there: start this on a node from which SLURM can be used") from error
    except subprocess.CalledProcessError as error:
        raise WorkflowError(f"{' '.join(command)}: {error.stderr.strip()}") from error


def _is_alive(run: str) -> bool:
    """Whether the Snakemake of a run still holds its file."""
    if not (RUNS / run).is_file():
        return False
    try:
        with lock(RUNS / run, shared=True):
            return False
    except BlockingIOError:
        return True


async def _answer(command: str) -> str | None:
    """What a command prints; None if it fails, or says nothing for a minute."""
    process = await asyncio.create_subprocess_exec(
        *shlex.split(command), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        out, _ = await asyncio.wait_for(process.communicate(), timeout=60)
    except TimeoutError:
        process.kill()
        return None
    return out.decode() if process.returncode == 0 else None
