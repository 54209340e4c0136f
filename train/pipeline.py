"""A training run from its configuration to the directories of its SAEs."""

import logging
import signal
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from mlsae.base.directories import held
from mlsae.base.errors import InputError, MlsaeError
from mlsae.base.files import read_sealed, seal, write_durably
from mlsae.base.interruption import (
    InterruptedWorkError,
    Interruption,
    StopNow,
    interruptible,
)
from mlsae.base.output.console import Progress, say
from mlsae.base.output.drawing import by_product
from mlsae.base.units import counted
from mlsae.sae.directory import TRAINING
from mlsae.store import open_corpus
from mlsae.train.calibrate import calibrate, is_calibrated
from mlsae.train.config import TrainConfig
from mlsae.train.data.decode import RowDecoder
from mlsae.train.data.overlap import Overlap, measure
from mlsae.train.data.sampler import check_world_size
from mlsae.train.options import write_run_file
from mlsae.train.plan import RunPlan, make_plans
from mlsae.train.published.run import run_paper
from mlsae.train.running.baseline import add_pca, pca_fvu
from mlsae.train.running.checkpoint import Checkpoints, common_step
from mlsae.train.running.devices import Alone, make_accelerator
from mlsae.train.running.evaluate import evaluate
from mlsae.train.running.log import draw_curves, read_log
from mlsae.train.running.loop import Loop
from mlsae.train.running.member import Member, divergence, is_finished
from mlsae.train.running.memory import require_training_memory
from mlsae.train.running.output import CHECKPOINTS, CURVES, LOG, check_output, claim
from mlsae.train.running.record import (
    advice,
    describe_run,
    format_summary,
    format_sweep,
    in_units_of_log,
    is_useless,
    sweep_entry,
    training_record,
)
from mlsae.train.running.team import Team, TeamShape, team_shape
from mlsae.train.running.tracking import check_tracker
from mlsae.train.sweep import SUMMARY, SWEEP, Sweep


class DivergedSAEsError(MlsaeError, ArithmeticError):
    """The loss of some SAEs in a sweep is no longer a finite number."""


class UselessSAEsError(MlsaeError, ArithmeticError):
    """SAEs are finished, and reconstruct no better than the mean of each layer."""


@dataclass(frozen=True)
class TrainResult:
    """One SAE's result."""

    directory: Path
    """The SAE directory."""
    metrics: Mapping[str, Any] | None
    """Summary over the validation rows; None if no sequence was held out."""


def run(config: TrainConfig) -> TrainResult:
    """Train an SAE from an activation store.

    Under torchrun or `accelerate launch` every process calls this, once; they share each batch.

    Args:
        config: the run's settings.

    Returns:
        Directory and quality of the SAE.

    Raises:
        InputError: something asked for cannot be done, or `config.out` holds another run.
        ResourceError: too little memory, or no such device.
        StoreError: the store cannot be read.
        DivergedError: the loss became infinite or no number.
        InterruptedWorkError: Ctrl-C or SIGTERM came; the state is kept.
    """
    return run_sweep(Sweep(config=config))[0]


def run_sweep(sweep: Sweep) -> list[TrainResult]:
    """Train several SAEs in one pass over the rows, each in its own directory.

    One of them does not depend on the others: an SAE that is trained alone with its
    settings has the same weights, bit for bit, on one rank.

    Args:
        sweep: the run's settings, and the values to sweep.

    Returns:
        Directory and quality for each SAE, ordered by the values.

    Raises:
        DivergedSAEsError: the loss of some SAEs became infinite or no number; the others are there.
        UselessSAEsError: some SAEs, all of them there, are no better than the mean of each layer.
        Exception: as `run`.
    """
    if sweep.config.preset is not None:
        metrics = run_paper(sweep)
        _refuse_useless([sweep.config.out] if is_useless(metrics) else [])
        return [TrainResult(sweep.config.out, metrics)]
    with interruptible() as interruption:
        try:
            accelerator = make_accelerator(sweep.config.device)
            results = _Run(sweep, accelerator, interruption).results()
        except StopNow:
            raise _stopped(interruption, "stopped") from None
    # torch warns of a process group that is still open when the interpreter ends.
    accelerator.end_training()
    return results


class _Run:
    """A run's SAEs, and the processes that train them."""

    def __init__(self, sweep: Sweep, accelerator: Accelerator, interruption: Interruption) -> None:
        self._sweep, self._config = sweep, sweep.config
        self._accelerator, self._interruption = accelerator, interruption
        self._shares_rows = sweep.config.distribute == "rows"

    def results(self) -> list[TrainResult]:
        config, accelerator = self._config, self._accelerator
        if self._shares_rows:
            check_world_size(accelerator.num_processes)
        if config.track is not None:
            check_tracker(config.track)
        if not accelerator.is_local_main_process:
            # Every process reads the stores; warnings of that are shown once a machine.
            logging.getLogger("mlsae").setLevel(logging.ERROR)
        store = open_corpus(config.cache, cache_dir=config.cache_dir, cache_bytes=config.cache_size)
        plans = make_plans(self._sweep, store)
        # One process writes, and holds the directory for all.
        with held(config.out) if accelerator.is_main_process else nullcontext():
            return self._results(plans)

    def _results(self, plans: Sequence[RunPlan]) -> list[TrainResult]:
        config, accelerator = self._config, self._accelerator
        self._check_outputs(plans)
        left = [p for p in plans if not is_finished(p) and divergence(p) is None]
        if left:
            self._train(plans, left)
        elif self._sweep.is_single and is_finished(plans[0]):
            self._say(f"{config.out} is finished already")
        accelerator.wait_for_everyone()
        return self._sum_up(plans)

    def _check_outputs(self, plans: Sequence[RunPlan]) -> None:
        config = self._config
        if not self._sweep.is_single:
            check_output(
                config.out,
                self._sweep.settings(),
                resume=config.resume,
                record=SWEEP,
            )
        for plan in plans:
            check_output(plan.config.out, plan.settings(), resume=config.resume)

    def _train(self, plans: Sequence[RunPlan], left: Sequence[RunPlan]) -> None:
        accelerator, shares = self._accelerator, self._shares_rows
        rank, world_size = accelerator.process_index, accelerator.num_processes
        ranks = accelerator if shares else Alone(accelerator.device)
        mine = left if shares else left[rank::world_size]
        if len(left) < world_size and not shares:
            raise InputError(
                f"{world_size} ranks cannot share {counted(len(left), 'SAE')}: start at most "
                f"{len(left)}, or give --distribute rows"
            )
        # Counts all SAEs in the run, so that one that goes on after others has as many threads.
        num_saes = len(plans) if shares else -(-len(plans) // world_size)
        shape = team_shape(num_saes, accelerator.device, ranks.num_processes)
        require_training_memory(
            mine, accelerator, ranks.process_index, ranks.num_processes, shape.num_workers
        )
        overlap = measure(plans[0].store, plans[0].validation)
        overlap.check()
        start = common_step([_checkpoints(plan) for plan in left])
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            if not self._sweep.is_single:
                claim(self._config.out, self._sweep.settings(), SWEEP)
            for plan in left:
                claim(plan.config.out, plan.settings())
            write_run_file(self._sweep, plans)
        accelerator.wait_for_everyone()
        # One SAE alone decodes piece by piece, as its memory allows.
        mixture = mine[0].mixture
        decode = RowDecoder(mixture.store, mixture.site, mixture.layers, accelerator.device)
        is_shared = len(mine) > 1 or mine[0].only is not None
        writes = accelerator.is_main_process or not shares
        members = [
            Member(plan, ranks, None if is_shared else decode, writes=writes) for plan in mine
        ]
        with Team(shape) as team, ExitStack() as trackers:
            for member in members:
                trackers.callback(member.close)
                member.begin(start)
            self._say(describe_run(plans, accelerator.device.type))
            if accelerator.is_main_process:
                overlap.tell()
            if start:
                self._say(f"resuming after step {start} of {mine[0].num_steps}")
            work = Loop(
                members, accelerator, decode if is_shared else None, team, shares_rows=shares
            )
            done = work.run(start, self._interruption)
            if done.was_stopped:
                how_far = f"stopped after step {done.step} of {mine[0].num_steps}"
                raise _stopped(self._interruption, how_far)
            try:
                for member in work.members:
                    member.keep()
                metrics = _measure(work.members, team, shown=accelerator.is_main_process)
                while work.members:
                    if work.members[0].check(found := metrics.pop(0)):
                        self._finish(work.members[0], found, shape, done.seconds, overlap)
                    del work.members[0]
            except StopNow:
                # Other ranks may have none left, so none waits here for another.
                for member in work.members:
                    member.save()
                raise

    def _finish(
        self,
        member: Member,
        metrics: Mapping[str, Any] | None,
        shape: TeamShape,
        seconds: float,
        overlap: Overlap,
    ) -> None:
        """Write an SAE's directory and print its summary."""
        if not member.writes:
            return
        plan, out = member.plan, member.plan.config.out
        lines = read_log(out / LOG)
        record = training_record(
            plan,
            member.sae,
            member.trainer.step_number,
            member.trainer.dead.num_rows,
            metrics,
            lines[-1],
            overlap,
            world_size=self._accelerator.num_processes,
            threads=shape.num_threads,
            seconds=seconds,
        )
        member.sae.save(out, {**record, **member.record})
        member.checkpoints.remove()
        with by_product(f"the line of {self._config.track}"):
            member.track(metrics)
        if self._sweep.is_single:
            say(format_summary(metrics))
            say(f"SAE: {out}")

    def _sum_up(self, plans: Sequence[RunPlan]) -> list[TrainResult]:
        """Read every SAE's results; a sweep's table is written and printed."""
        results, entries, diverged, useless = [], [], [], []
        finished: list[tuple[RunPlan, Mapping[str, Any] | None]] = []
        for plan in plans:
            found: Mapping[str, Any] | str
            if (error := divergence(plan)) is not None:
                if self._sweep.is_single:
                    raise error
                diverged.append(f"{plan.name}: {error}")
                found = str(error)
            else:
                _checkpoints(plan).remove()
                found = read_sealed(plan.config.out / TRAINING)
                results.append(TrainResult(plan.config.out, found["metrics"]))
                finished.append((plan, found["metrics"]))
                if is_useless(found["metrics"]):
                    useless.append(plan.config.out)
            entries.append(sweep_entry(plan, found))
        if self._accelerator.is_main_process and not self._sweep.is_single:
            write_durably(self._config.out / SUMMARY, seal({"saes": entries}))
            say(format_sweep(entries))
            say(f"SAEs: {self._config.out}")
        if self._accelerator.is_main_process:
            _draw(finished)
            for line in advice(finished):
                say(f"warning: {line}", err=True)
        if diverged:
            raise DivergedSAEsError(
                f"{len(diverged)} of {counted(len(plans), 'SAE')} diverged, the others are "
                f"finished: {'; '.join(diverged)}"
            )
        _refuse_useless(useless)
        return results

    def _say(self, text: str) -> None:
        if self._accelerator.is_main_process:
            say(text)


def _refuse_useless(directories: Sequence[Path]) -> None:
    if directories:
        raise UselessSAEsError(
            f"{', '.join(map(str, directories))}: finished and kept, but no better than the mean "
            f"at any layer (FVU 1 or more): train again into another --out with a lower --lr "
            f"or more --epochs"
        )


def _draw(finished: Iterable[tuple[RunPlan, Mapping[str, Any] | None]]) -> None:
    """Draw the curves that are missing, once all that the run is for is there."""
    for plan, metrics in finished:
        out = plan.config.out
        if not (out / CURVES).exists():
            with by_product(str(out / CURVES)):
                validation = in_units_of_log(plan, metrics)
                draw_curves(read_log(out / LOG), plan.layers, validation, out / CURVES)


def _measure(
    members: Sequence[Member], team: Team, *, shown: bool
) -> list[Mapping[str, Any] | None]:
    """Metrics of SAEs on the rows held out, beside those of PCA; None if there are none."""
    if not members or not len(members[0].plan.validation):
        return [None] * len(members)
    plan, ranks = members[0].plan, members[0].ranks
    shared: dict[str, Any] = {
        "skip_positions": plan.config.skip_positions,
        "rank": ranks.process_index,
        "world_size": ranks.num_processes,
        "sum_over_ranks": lambda tensor: ranks.reduce(tensor, "sum"),
    }

    def evaluated(member: Member) -> dict[str, Any]:
        sae, own = member.sae, member.plan
        rows = (sae, own.store, own.site, own.layers, own.validation)
        if is_calibrated(sae.architecture):
            calibrate(*rows, report=progress.update, **shared)
        return evaluate(*rows, report=progress.update, **shared)

    own_share = len(plan.validation[ranks.process_index :: ranks.num_processes])
    layer_rows = own_share * plan.store.rows_per_sequence
    num_rows = layer_rows * sum(
        len(member.plan.layers) * (1 + is_calibrated(member.plan.sae.architecture))
        for member in members
    )
    with Progress("evaluate", num_rows, "row", shown=shown) as progress:
        metrics = team.map(evaluated, members)
    layers = plan.mixture.layers
    with Progress("PCA", len(layers), "layer", shown=shown) as progress:
        fvu = pca_fvu(
            plan.store,
            plan.site,
            layers,
            plan.validation,
            device=ranks.device,
            report=progress.update,
            **shared,
        )
    for member, found in zip(members, metrics, strict=True):
        add_pca(found, fvu, member.sae.architecture.most_active)
    return list(metrics)


def _checkpoints(plan: RunPlan) -> Checkpoints:
    return Checkpoints(plan.config.out / CHECKPOINTS, plan.config.keep)


def _stopped(interruption: Interruption, how_far: str) -> InterruptedWorkError:
    """Error for a run that the user stopped, in one line."""
    # A signal to one of several processes stops them all.
    number = interruption.signal_number or signal.SIGTERM
    return InterruptedWorkError(f"{how_far}: add --resume to the same command to go on", number)
