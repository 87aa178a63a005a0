"""Run the cells of a sweep that are not there yet, on joblib's backends."""

# Dask's clients carry no types.
# mypy: allow-untyped-calls

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import joblib
from tqdm.auto import tqdm

from causal_probe.arguments import check_value
from causal_probe.errors import CausalProbeError
from causal_probe.options import takes
from causal_probe.options.studies import SweepOptions
from causal_probe.results import csv_text, to_jsonable, write_text
from causal_probe.sweep.cells import PROBES, Outcome, run_cell
from causal_probe.sweep.plan import Cell, plan, read_spec
from causal_probe.sweep.result import Sweep
from causal_probe.sweep.store import Store

__all__ = ["sweep"]

#: So many seconds are waited for a scheduler, and for its first worker.
PATIENCE = 15
#: So often may the workers die, one time after the other, without a cell being finished in between.
TRIES = 3


@takes(SweepOptions)
def sweep(spec: Mapping[str, Any] | str | os.PathLike[str], o: SweepOptions) -> Sweep:
    """Run probes at many points, each a cell of its own; what is finished stays, and is not run again.

    A cell is a pure function of its spec: its random numbers come from a seed derived from it
    (:attr:`~causal_probe.sweep.Cell.derived_seed`), and it runs with the number of threads in the spec. So on one kind
    of CPU its file is the same to the last bit on every backend, with every number of workers, and in every order. A cell
    that fails is recorded with its error, and the others go on; it is tried again when the sweep is started again.

    Only this process writes. A worker that dies takes the cells it was running with it, and they are run again. A sweep that has grown
    goes on in the same folder. (Not on Ray: its backend for joblib, looked at in Ray 2.60, does not give results as they come, and so none
    that could be kept.)

    A spec says:

    - ``probes``: a name, a list of names, or a mapping from names to settings of their own. There are ``recover`` and
      ``gradient`` (tasks of known graph), ``scan`` and ``head_graphs`` (models and checkpoints).
    - ``grid``: by option, a list of values; every combination is a point. ``seed`` is an option of every probe; ``model`` is
      what :func:`~causal_probe.models.load_model` takes, ``revision`` one on the hub; ``corpus``, with ``length``, ``separator`` and
      ``field``, is text (:func:`~causal_probe.hooks.corpus`), and ``shard: [0/4, 1/4, 2/4, 3/4]`` makes a cell of each shard for
      ``scan`` (:meth:`~causal_probe.experiments.Sweep.merged` and ``merged.csv`` put them together).
    - ``cells``: points as a list of mappings, instead of the grid or combined with it.
    - ``settings``: options that all points share.
    - ``threads``: of each cell; 1 by default.

    Raises
    ------
    CausalProbeError
        If the spec can't be understood, the folder is being written by another sweep, holds something else or a newer format,
        Dask is not installed or not reachable, or the workers keep dying.

    Examples
    --------
    >>> import tempfile
    >>> spec = {"probes": "gradient", "grid": {"graph": ["chain", "pairs"], "seed": [0, 1]}, "settings": {"n_positions": 6}}
    >>> with tempfile.TemporaryDirectory() as out:
    ...     found = sweep(spec, out=out)
    ...     found.summary()[["graph", "seed", "status", "exact"]]
       graph  seed    status  exact
    0  chain     0  finished   True
    1  chain     1  finished   True
    2  pairs     0  finished   True
    3  pairs     1  finished   True
    """
    check_value("spec", spec, Mapping[str, Any] | str | os.PathLike[str])
    if o.backend == "dask":
        try:
            import distributed  # noqa: F401
        except ImportError as error:
            raise CausalProbeError(
                "The backend dask needs Dask, which is not installed: pip install 'causal-probe[dask]'."
            ) from error
    functions: dict[str, Callable[..., Outcome]] = {**PROBES, **(o.probes or {})}
    content: dict[str, Any] = dict(spec) if isinstance(spec, Mapping) else read_spec(spec)
    cells = plan(content, functions)
    store = Store(o.out)
    with store.writing(cells, to_jsonable(content)):
        failed = _run(store, cells, functions, o)
        found = Sweep(Path(o.out), cells, failed, to_jsonable(content))
        write_text(store.folder / "summary.csv", csv_text(found.summary()))
        merged = store.folder / "merged.csv"
        if any("shard" in cell.options for cell in cells):
            merged.unlink(missing_ok=True)
            with contextlib.suppress(CausalProbeError):  # a shard is missing or has failed: it is said by merged()
                write_text(merged, csv_text(found.merged()))
        if o.page is not None:
            o.page(found, store.folder)
    return found


def _run(
    store: Store, cells: Sequence[Cell], functions: Mapping[str, Callable[..., Outcome]], o: SweepOptions
) -> dict[str, str]:
    """Run what is not finished; return the errors of what failed, in the cells' order."""
    there = store.finished()
    left = {cell.key: cell for cell in cells if cell.key not in there}
    errors: dict[str, str] = {}
    deaths = 0
    with tqdm(total=len(cells), initial=len(cells) - len(left), disable=not o.progress, unit="cell") as bar:
        while left and deaths < TRIES:
            before = len(left)
            try:
                with _workers(o, threads=cells[0].threads) as options:
                    # One cell at a time to a worker: what is finished is written at once.
                    parallel = joblib.Parallel(return_as="generator_unordered", batch_size=1, **options)
                    todo = [joblib.delayed(run_cell)(cell, functions[cell.probe]) for cell in left.values()]
                    for done in parallel(todo):
                        cell = left.pop(done.key)
                        if done.content is None:
                            errors[done.key] = done.error or ""
                            store.put_failure(cell, errors[done.key], done.traceback)
                        else:
                            store.put(done.key, done.content)
                        bar.update()
            except CancelledError as error:  # by Dask, when it can no longer be reached
                raise CausalProbeError(
                    f"The Dask scheduler at {o.scheduler!r} was lost; {len(left)} cells are left. What is finished is kept: the same sweep, "
                    "started again, goes on from there."
                ) from error
            except _worker_deaths() as error:
                deaths = 1 if len(left) < before else deaths + 1
                reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if left:
        raise CausalProbeError(
            f"The workers died {deaths} times without finishing a cell ({reason}); {len(left)} cells are left. They may need more "
            "memory than there is: run fewer at once with `jobs`. What is finished is kept."
        )
    return {cell.key: errors[cell.key] for cell in cells if cell.key in errors}


@contextlib.contextmanager
def _workers(o: SweepOptions, *, threads: int) -> Iterator[dict[str, Any]]:
    """The arguments of joblib.Parallel."""
    if o.backend == "loky":
        with joblib.parallel_config("loky", inner_max_num_threads=threads):
            yield {"n_jobs": o.jobs}
        return
    from distributed import Client, LocalCluster

    with contextlib.ExitStack() as stack:
        try:
            if o.scheduler is None:
                address = stack.enter_context(
                    LocalCluster(
                        n_workers=o.jobs, threads_per_worker=1, processes=True, dashboard_address=":0", silence_logs=50
                    )
                )
            else:
                address = o.scheduler
            client = stack.enter_context(Client(address, set_as_default=False, timeout=PATIENCE))
        except (OSError, RuntimeError, ValueError, TypeError) as error:
            where = "a cluster on this machine" if o.scheduler is None else repr(o.scheduler)
            raise CausalProbeError(f"There is no Dask scheduler at {where}: {' '.join(str(error).split())}.") from error
        try:
            client.wait_for_workers(1, timeout=PATIENCE)
        except TimeoutError as error:
            raise CausalProbeError(
                f"The Dask scheduler at {o.scheduler!r} has no workers, and got none in {PATIENCE} seconds: start some with `dask worker "
                f"{o.scheduler}`, on machines that have causal-probe and the files."
            ) from error
        with joblib.parallel_config(_cluster(client)):
            yield {"n_jobs": -1}


def _cluster(client: Any) -> Any:
    """Joblib's backend for a Dask cluster, also for one of a single thread: joblib itself would run the cells here then."""
    from joblib._dask import DaskDistributedBackend

    class Cluster(DaskDistributedBackend):  # type: ignore[misc] # joblib carries no types
        def effective_n_jobs(self, n_jobs: int) -> int:
            return max(2, int(super().effective_n_jobs(n_jobs)))

    return Cluster(client=client)


def _worker_deaths() -> tuple[type[Exception], ...]:
    """The exceptions raised when a worker process has died: by loky, and by Dask when a cell has killed several."""
    try:
        from distributed import KilledWorker
    except ImportError:
        return (BrokenProcessPool,)
    return BrokenProcessPool, KilledWorker
